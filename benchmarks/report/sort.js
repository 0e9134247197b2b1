// A click on the heading of a sortable table sorts its rows; a second click turns them round.
for (const heading of document.querySelectorAll("table.sortable thead th")) {
  const button = document.createElement("button");
  button.append(...heading.childNodes);
  heading.append(button);
  button.addEventListener("click", () => {
    const body = heading.closest("table").tBodies[0];
    const column = heading.cellIndex;
    const key = (row) => {
      const cell = row.cells[column];
      const exact = cell.querySelector("data");
      const number = exact ? Number(exact.value) : Number.parseFloat(cell.textContent);
      return Number.isNaN(number) ? cell.textContent : number;
    };
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;
      return x < y ? -1 : x > y ? 1 : 0;
    });
    const down = heading.getAttribute("aria-sort") === "ascending";
    for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...(down ? rows.reverse() : rows));
  });
}

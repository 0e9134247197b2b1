"""Any pipeline that can be planned, for hypothesis."""

from hypothesis import strategies as st

from attnres_ext.parallel import place_stages


@st.composite
def pipelines(draw, most_ranks=64, most_stages=8):
    """``(num_sublayers, sublayers_per_block, first_sites, ranks)``."""
    num_ranks = draw(st.integers(1, most_ranks))
    stages_per_rank = draw(st.integers(1, most_stages))
    num_stages = num_ranks * stages_per_rank
    ranks = draw(
        st.one_of(
            st.just(place_stages(num_ranks, stages_per_rank, "loop")),
            st.just(place_stages(num_ranks, stages_per_rank, "v")),
            st.permutations(place_stages(num_ranks, stages_per_rank, "loop")).map(tuple),
        )
    )
    num_sublayers = num_stages + draw(st.integers(0, 3 * num_stages))
    random = draw(st.randoms(use_true_random=False))
    cuts = sorted(random.sample(range(1, num_sublayers + 1), num_stages - 1))
    if cuts and draw(st.booleans()):
        cuts[0] = 0  # the first stage has the embedding alone
    block = draw(st.one_of(st.none(), st.integers(1, 2 * num_sublayers // num_stages + 24)))
    return num_sublayers, block, (0, *cuts), ranks

"""One HTML page from a folder of results: ``attnres bench report DIR``.

``kept`` reads the folder, ``notices`` says what to mind, ``history`` finds regressions,
``sections`` chooses what each part shows, ``charts`` draws with matplotlib, and
``page.html.jinja`` lays it all out. The page is whole in itself: nothing is fetched.
"""

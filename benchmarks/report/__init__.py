"""One HTML page from a folder of results: ``attnres bench report DIR``.

``kept`` reads the folder, ``notices`` says what to mind, ``history`` finds regressions, each module
of ``sections`` draws one part, and ``page`` puts them together. ``bars`` and ``lines`` are the two
kinds of charts. The page is whole in itself: nothing is fetched, and it prints.
"""

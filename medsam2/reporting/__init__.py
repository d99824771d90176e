"""Tables, pages, pictures and curves, as evaluation, training and the inspection of shards show them.

`tables` has one `Table` for the terminal, Markdown, LaTeX and HTML; `page` renders one self-contained page;
`overlays` draws outlines and prompts over frames; `curves` draws line diagrams; `style` has the palette of all of them.
"""

"""Tables, pages, images and curves for evaluation, training and the inspection of shards.

`tables` has one `Table` for the terminal, Markdown, LaTeX and HTML; `page` renders a self-contained HTML page;
`overlays` draws outlines and prompts over frames; `curves` draws line diagrams; `style` has the common palette.
"""

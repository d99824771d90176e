"""What the pages of evaluations and of training runs share: frame, look, and macros for tables and pictures."""

MACROS = """
{%- macro table(content, folded=false) %}
{% if folded %}<details><summary>{{ content.title }}</summary>{% endif %}
<div class="wide"><table>
<tr>
{%- for name in content.header %}<th{% if loop.index0 < content.texts %} class="text"{% endif %}>{{ name }}</th>
{%- endfor %}</tr>
{% for cells in content.lines %}
<tr{% if content.is_total(loop.index0) %} class="total"{% endif %}>
{%- for cell in cells %}
<td class="{{ "text" if loop.index0 < content.texts }}{{ " long" if cell | length > 28 }}">{{ cell }}</td>
{%- endfor %}</tr>
{% endfor %}
</table></div>
{% for note in content.notes %}<p>{{ note }}</p>{% endfor %}
{% if folded %}</details>{% endif %}
{% endmacro -%}
{%- macro gallery(pictures) %}
{% for picture in pictures %}
<figure><img alt="{{ picture.alt }}" src="data:image/webp;base64,{{ picture.data }}">
<figcaption>{{ picture.alt }}</figcaption></figure>
{% endfor %}
{% endmacro -%}
"""

STYLE = """
:root { color-scheme: dark; }
body { background: #0b0f14; color: #e6edf3; font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1280px;
       padding: 2rem 1.5rem 4rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.25rem; margin: 3rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.75rem 0 .5rem; }
p { color: #8b98a5; margin: .25rem 0; max-width: 75rem; }
nav { margin: 1rem 0; } nav a { color: #38bdf8; margin-right: 1.1rem; white-space: nowrap; text-decoration: none; }
.wide { margin: .25rem 0 .5rem; overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #21262d; padding: .35rem .8rem; text-align: right; white-space: nowrap;
         vertical-align: top; }
th { color: #8b98a5; font-weight: 600; white-space: pre-line; } .text { text-align: left; }
.long { min-width: 9rem; white-space: normal; overflow-wrap: break-word; } .text.long { min-width: 14rem; }
tr.total td { font-weight: 700; }
img { display: block; max-width: 100%; border-radius: 6px; }
figure { margin: 0 0 1.1rem; } figure img { border: 1px solid #21262d; }
figcaption { color: #8b98a5; font-size: 13px; padding-top: .25rem; }
.warning { background: #2d1619; border-left: 4px solid #f87171; color: #fca5a5; margin: .5rem 0;
           padding: .45rem .9rem; max-width: none; }
.mark { background: #2a2410; border-left: 4px solid #fbbf24; color: #fcd34d; margin: .5rem 0; padding: .45rem .9rem;
        max-width: none; }
details { border-bottom: 1px solid #21262d; padding: .5rem 0; } summary { cursor: pointer; color: #38bdf8; }
pre { background: #11161d; border-radius: 6px; overflow-x: auto; padding: 1rem; color: #8b98a5; }
"""


def page(body: str, style: str = "") -> str:
    """The template of a page with `title` and `lead` on top; `style` is added to the common one."""
    return f"""{MACROS}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{{{ title }}}}</title>
<style>{STYLE}{style}</style>
</head>
<body>
<h1>{{{{ title }}}}</h1>
<p>{{{{ lead }}}}</p>
{body}</body>
</html>
"""

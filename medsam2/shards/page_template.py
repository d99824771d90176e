"""The HTML of an inspection's page: what shards and raw data both show; sections without content are left out."""

TEMPLATE = """
{%- macro kind(cell) %}
{% if cell is not number %} class="text{{ " short" if cell | length < 24 }}"{% endif %}
{% endmacro %}
{% macro thousands(number) %}{{ "{:,}".format(number) }}{% endmacro %}
{% macro table(content) %}
<div class="wide"><table>
<tr>
{% for name in content.columns %}
<th{{ kind(content.rows[0][loop.index0]) if content.rows }}>{{ name }}</th>
{% endfor %}
</tr>
{% for row in content.rows %}
<tr>
{% for cell in row %}
<td{{ kind(cell) }}>{{ thousands(cell) if cell is integer else cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</table></div>
{% endmacro -%}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { background: #fff; color: #1f2328; font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1280px;
       padding: 2rem 1.5rem 4rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem; }
p { color: #59636e; margin: .25rem 0; }
nav { margin: .75rem 0; } nav a { color: #0550ae; margin-right: 1rem; white-space: nowrap; }
.wide { margin-bottom: 1rem; overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #e5e7eb; padding: .35rem .8rem; text-align: right; vertical-align: top; }
th { color: #59636e; font-weight: 600; white-space: nowrap; } .text { text-align: left; }
td { white-space: nowrap; } td.text { max-width: 26rem; white-space: normal; }
td.short { white-space: nowrap; }
dl { display: grid; gap: .5rem 1.5rem; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); margin: 0; }
dt { color: #59636e; font-size: 13px; } dd { margin: 0; overflow-wrap: anywhere; }
.charts { display: grid; gap: 1.5rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); }
.charts figcaption { font-weight: 600; } .charts img { display: block; width: 100%; }
.charts p { font-size: 13px; }
.sheet { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 186px), 1fr)); }
figure { margin: 0; }
.sheet .frame { aspect-ratio: 1; background: #000; border-radius: 6px; overflow: hidden; }
.sheet img { display: block; height: 100%; object-fit: contain; width: 100%; }
.sheet figcaption { color: #59636e; font-size: 12px; line-height: 1.4; overflow-wrap: anywhere; padding-top: .25rem; }
.name { color: #1f2328; display: inline-block; margin-right: .6rem; }
.name i { border-radius: 50%; display: inline-block; height: .65em; margin-right: .3em; width: .65em; }
.problem { background: #fff1f0; border-left: 4px solid #b42318; color: #8a1c12; margin: .4rem 0; padding: .4rem .8rem;
           overflow-wrap: anywhere; }
details { border-bottom: 1px solid #e5e7eb; padding: .4rem 0; } summary { cursor: pointer; }
summary b { display: inline-block; min-width: 14rem; }
code, .id { font-family: ui-monospace, monospace; font-size: 13px; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ lead }}</p>
{% if shards %}
<nav><a href="#overview">Overview</a> <a href="#warnings">Warnings ({{ warnings }})</a>
<a href="#structures">Structures</a> <a href="#datasets">Data sets</a> <a href="#distributions">Distributions</a>
<a href="#pictures">Pictures</a> <a href="#duplicates">Duplicates</a></nav>
{% endif %}
{% if problems %}
<h2>Problems</h2>
{% for problem in problems %}
<div class="problem">{{ problem }}</div>
{% endfor %}
{% endif %}
{% if cases %}
<h2>Cases</h2>
{{ table(cases) }}
{% endif %}
{% if overview %}
<h2 id="overview">Overview</h2>
{{ table(overview) }}
{% endif %}
{% if shards %}
<h2 id="warnings">Warnings</h2>
{% for kind, (count, found) in findings.items() %}
<details{% if count <= 8 %} open{% endif %}><summary><b>{{ kind }}</b> {{ thousands(count) }}</summary>
<div class="wide"><table>
<tr><th class="text">data set</th><th class="text">split</th><th class="text">case</th><th class="text">what</th>
<th class="text">what to do</th></tr>
{% for finding in found %}
<tr><td class="text">{{ finding.dataset }}</td><td class="text">{{ finding.split }}</td>
<td class="text id">{{ finding.case }}</td><td class="text">{{ finding.what }}</td>
<td class="text">{{ finding.remedy }}</td></tr>
{% endfor %}
</table></div>
{% if found | length < count %}<p>The first {{ thousands(found | length) }} of {{ thousands(count) }}.</p>{% endif %}
</details>
{% else %}
<p>None.</p>
{% endfor %}
{% endif %}
{% if structures %}
<h2 id="structures">Structures</h2>
<p>Objects of the segments, the frames on which they are seen, and their median area there (pixels of the stored
grid).</p>
<details{% if structures.rows | length <= 24 %} open{% endif %}><summary>{{ structures.rows | length }} rows</summary>
{{ table(structures) }}
</details>
{% endif %}
{% if datasets %}
<h2 id="datasets">Data sets</h2>
<p>Size (height x width) and number of the frames of a case as they came, and what made the stored intensities.</p>
{{ table(datasets) }}
{{ table(provenance) }}
{% endif %}
{% if preparation %}
<h2>Preparation</h2>
<dl>{% for name, value in preparation %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>{% endfor %}</dl>
{% endif %}
{% if charts %}
<h2 id="distributions">Distributions</h2>
{% if histogram_note %}<p>{{ histogram_note }}</p>{% endif %}
<div class="charts">
{% for chart in charts %}
<figure><figcaption>{{ chart.title }}</figcaption>
<img alt="{{ chart.title }}" src="data:image/svg+xml;base64,{{ chart.data }}">
{% if chart.note %}<p>{{ chart.note }}</p>{% endif %}</figure>
{% endfor %}
</div>
{% endif %}
<h2 id="pictures">Pictures</h2>
<p>{{ pictures_note }}</p>
<div class="sheet">
{% for picture in pictures %}
<figure><div class="frame"><img alt="{{ picture.text }}" src="data:image/jpeg;base64,{{ picture.data }}"></div>
<figcaption>
{% for name, colour in picture.names %}
<span class="name"><i style="background: {{ colour }}"></i>{{ name }}</span>
{% endfor %}
{% if picture.more %}and {{ picture.more }} more{% endif %}<br>{{ picture.text }}</figcaption></figure>
{% endfor %}
</div>
{% if shards %}
<h2 id="duplicates">Duplicates</h2>
{% if duplicates.rows %}
<p>Cases of one group have equal images.</p>
{{ table(duplicates) }}
{% else %}
<p>No two cases have equal images.</p>
{% endif %}
{% if moved %}
<p>Patients who were moved to the split of a case with an equal image:</p>
{{ table(moved) }}
{% endif %}
{% endif %}
</body>
</html>
"""

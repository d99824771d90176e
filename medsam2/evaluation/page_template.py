"""The HTML of an evaluation's page; sections without content are left out."""

from medsam2.evaluation.page_style import page

TEMPLATE = page(
    """<nav>
{%- for section in sections %}<a href="#{{ section.name }}">{{ section.name }}</a>{% endfor %}
<a href="#checkpoints">checkpoints</a> <a href="#speed">speed and memory</a>
{% if failures %}<a href="#failures">failures ({{ failures.lines | length }})</a>{% endif %}
<a href="#settings">settings</a></nav>
{% for warning in warnings %}<p class="warning">{{ warning }}</p>{% endfor %}

{% for section in sections %}
<h2 id="{{ section.name }}">{{ section.name }}</h2>
{% if section.citation %}<p>{{ section.citation }}</p>{% endif %}
{% for mark in section.marks %}<p class="mark">{{ mark }}</p>{% endfor %}
{{ table(section.scores) }}
{{ table(section.metrics, true) }}
{% if section.sizes %}
<h3>Small and large objects</h3>
{{ table(section.sizes) }}
{% endif %}
{% if section.comparisons %}
<h3>Differences between checkpoints</h3>
{{ table(section.comparisons) }}
{% endif %}
<h3>Spread by structure</h3>
<img alt="Box plots of the DSC by structure and checkpoint" src="data:image/svg+xml;base64,{{ section.boxes }}">
{% if section.robustness %}
<h3>Robustness</h3>
<img alt="DSC against the severity of each corruption" src="data:image/png;base64,{{ section.curves }}">
{{ table(section.robustness) }}
{% endif %}
{% if section.pictures %}
<h3>Pictures</h3>
<p>The number in a corner is the DSC of that slice.
{%- if section.more %} Some of them; all are in overlays/{{ section.name }}/.{% endif %}</p>
{{ gallery(section.pictures) }}
{% endif %}
<h3>Lowest DSC of {{ last }}</h3>
{{ table(section.worst) }}
{{ gallery(section.worst_pictures) }}
{% endfor %}

<h2 id="checkpoints">Checkpoints</h2>
{{ table(checkpoints) }}
<h2 id="speed">Speed and memory</h2>
{{ table(speed) }}
{% if failures %}
<h2 id="failures">Failures</h2>
{{ table(failures) }}
{% endif %}
<h2 id="settings">Settings</h2>
<details><summary>settings.json</summary><pre>{{ settings }}</pre></details>
"""
)

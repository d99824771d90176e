"""The HTML of a run's page; sections without content are left out."""

from medsam2.evaluation.page_style import page

RUN_STYLE = """
.facts { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1.2rem 0 .5rem; }
.fact { background: #11161d; border: 1px solid #21262d; border-radius: 8px; min-width: 8.2rem; padding: .6rem .9rem; }
.fact b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; line-height: 1.35; }
.fact span { color: #8b98a5; font-size: 12.5px; }
.strips { display: grid; gap: .25rem .9rem; grid-template-columns: max-content minmax(0, 1fr); align-items: center; }
.strips .step { color: #8b98a5; font-size: 13px; text-align: right; font-variant-numeric: tabular-nums; }
.strips .step b { color: #e6edf3; display: block; font-size: 1.05rem; }
.strips img { border-radius: 4px; max-height: 224px; }
.key b { font-weight: 600; }
"""

TEMPLATE = page(
    """<nav>
{%- if curves %}<a href="#curves">curves</a>{% endif %}
{% if tables %}<a href="#validation">validation</a>{% endif %}
{% if kept %}<a href="#kept">what was kept</a>{% endif %}
{% if clips %}<a href="#pictures">pictures</a>{% endif %}
<a href="#events">events</a> <a href="#configuration">configuration</a></nav>
{% for warning in warnings %}<p class="warning">{{ warning }}</p>{% endfor %}
<div class="facts">
{% for fact in facts %}
<div class="fact"><b>{{ fact.value }}</b><span>{{ fact.name }}</span></div>
{% endfor %}
</div>

{% if curves %}
<h2 id="curves">Curves</h2>
<p>Against optimiser steps. Faint: what was logged; strong: a running mean.</p>
<img alt="Curves of losses, scores, learning rate, gradient norm and throughput"
 src="data:image/svg+xml;base64,{{ curves }}">
{% endif %}

{% if tables %}
<h2 id="validation">Validation</h2>
<p>Mean DSC of whole cases of the val split by modality and structure.</p>
{% for entry in tables %}
{% if tables | length > 1 %}<h3>{{ entry.title }}</h3>{% endif %}
{{ table(entry) }}
{% endfor %}
{% endif %}

{% if kept %}
<h2 id="kept">What was kept</h2>
<p>The starting model beside this one: gain on new data, retention on old, and whether prompts are obeyed.</p>
{{ table(kept) }}
{% endif %}

{% if clips %}
<h2 id="pictures">Pictures</h2>
<p class="key">Always the same clips and prompts. <b style="color: {{ colours.truth }}">ground truth</b>,
<b style="color: {{ colours.prediction }}">prediction</b>, <b style="color: {{ colours.prompt }}">the box</b> of the
prompted frame. The number in a corner is the DSC of that frame, the one on the left of the clip.</p>
{% for clip in clips %}
<h3>{{ clip.title }}</h3>
<div class="strips">
{% for strip in clip.strips %}
<div class="step"><b>{{ strip.dsc }}</b>{{ strip.label }}</div>
<img alt="{{ clip.title }}, {{ strip.label }}: DSC {{ strip.dsc }}" src="data:image/webp;base64,{{ strip.data }}">
{% endfor %}
</div>
{% endfor %}
{% endif %}

<h2 id="events">Events</h2>
{{ table(events) }}

<h2 id="configuration">Configuration</h2>
<details><summary>config.yaml</summary><pre>{{ config }}</pre></details>
<details><summary>environment.json</summary><pre>{{ environment }}</pre></details>
""",
    RUN_STYLE,
)

"""The page's style sheet: light and dark, from a phone's width up."""

STYLE = """
:root {
  color-scheme: light dark;
  --back: #ffffff; --card: #f6f7f9; --line: #d9dde3; --text: #1c2430; --soft: #5a6472;
  --link: #1a5fb4; --good: #1f7a45; --good-back: #9fd3b4; --warn: #8a5a00; --warn-back: #f2c14e;
  --bad: #b3261e; --bad-back: #e5584f; --gone: #3b3f46;
  --c1: #1f6fb5; --c2: #c8571b; --c3: #2b8a57; --c4: #8b4fb3;
  --c5: #b8456b; --c6: #7a6a1a; --c7: #2a8c94; --c8: #5d6470;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #14181d; --card: #1d232a; --line: #36404b; --text: #e6eaef; --soft: #a0abb8;
    --link: #7cb8f7; --good: #6fcf97; --good-back: #2f7a50; --warn: #f2c14e; --warn-back: #b98a1c;
    --bad: #ff8a80; --bad-back: #d9483e; --gone: #aab2bd;
    --c1: #6db3f2; --c2: #f2935c; --c3: #6fcf97; --c4: #c79bea;
    --c5: #f08fb0; --c6: #d3c165; --c7: #67cdd6; --c8: #a9b3c0;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 1.25rem 1rem 3rem; max-width: 80rem; background: var(--back);
  color: var(--text); font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 {
  font-size: 1.2rem; margin: 2.25rem 0 .75rem; padding-top: .75rem;
  border-top: 1px solid var(--line);
}
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; overflow-wrap: anywhere; }
p { margin: .4rem 0; max-width: 48rem; }
a { color: var(--link); }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: .5rem 0 1rem; }
.note, .unit { color: var(--soft); font-size: .875rem; font-weight: normal; }
ul.plain, ol.events { list-style: none; margin: 0; padding: 0; }
ul.plain li { margin: .25rem 0; }
.tiles { display: grid; gap: .5rem; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .5rem .75rem; }
.tiles span { display: block; color: var(--soft); font-size: .8125rem; }
.tiles b { font-size: 1.125rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.good { color: var(--good); } .bad { color: var(--bad); } .warn { color: var(--warn); }
.charts { display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
figure { margin: 0; }
.chart { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .6rem .6rem .3rem; min-width: 0; display: flex; flex-direction: column; }
.chart svg { margin-top: auto; }
.chart figcaption { font-weight: 600; font-size: .9375rem; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0 .9rem; margin: .1rem 0 .3rem;
  padding: 0; font-size: .8125rem; color: var(--soft); overflow-wrap: anywhere; }
.legend b { color: var(--text); font-variant-numeric: tabular-nums; }
.legend i { display: inline-block; width: .9rem; height: .25rem; border-radius: 2px;
  vertical-align: middle; margin-right: .35rem; }
.legend i.cell { height: .8rem; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 11px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
svg text.x { text-anchor: middle; } svg text.y, svg text.end { text-anchor: end; }
.grid { stroke: var(--line); stroke-width: 1; fill: none; }
.axis { stroke: var(--soft); stroke-width: 1; fill: none; }
.line { fill: none; stroke-width: 1.75; stroke-linejoin: round; stroke-linecap: round; }
.hit { fill: transparent; }
.hit:hover, .dot:hover { fill: var(--text); }
.scroll { overflow-x: auto; }
.timeline { max-width: 48rem; }
@media (max-width: 40rem) { svg.timeline text { font-size: 14px; } }
.unknown { fill: var(--card); stroke: var(--line); stroke-width: .5; }
.equal { fill: var(--good-back); background: var(--good-back); }
.warned { fill: var(--warn-back); background: var(--warn-back); }
.parted { fill: var(--bad-back); background: var(--bad-back); }
.missing { fill: var(--gone); background: var(--gone); }
.mark path { stroke: currentColor; stroke-width: 1; stroke-dasharray: 2 2; fill: none; }
.mark circle { fill: var(--back); stroke: currentColor; stroke-width: 1.75; }
svg .mark text { fill: currentColor; text-anchor: middle; font-weight: 600; }
svg.timeline .mark text { font-size: 11px; }
svg.timeline .mark text.small { font-size: 8px; }
.k-desync circle, .k-rank_missing circle { fill: currentColor; stroke: currentColor; }
svg .k-desync text, svg .k-rank_missing text { fill: var(--back); }
.k-desync { color: var(--bad); } .k-rank_missing { color: var(--gone); }
.k-warning, .k-save_without_manifest, .k-not_compared { color: var(--warn); }
.k-save, .k-resume { color: var(--c1); } .k-repair { color: var(--c4); }
.k-begin, .k-end, .k-other { color: var(--soft); }
ol.events > li { border-left: .25rem solid currentColor; background: var(--card);
  border-radius: 0 .5rem .5rem 0; margin: .5rem 0; padding: .5rem .75rem; }
ol.events > li > * { color: var(--text); }
ol.events .badge { color: inherit; font-weight: 700; margin-right: .5rem; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 0 .9rem;
  margin: .3rem 0;  font-size: .875rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
pre { margin: .4rem 0 0; padding: .5rem .6rem; border: 1px solid var(--line); border-radius: .35rem;
  background: var(--back); font: .8125rem/1.45 ui-monospace, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24rem; overflow-y: auto; }
table { border-collapse: collapse; font-size: .875rem; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 600; }
td { font-variant-numeric: tabular-nums; min-width: 5rem; }
td:first-child { min-width: 8rem; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--link); }
.answers { display: grid; gap: .75rem; }
.answer { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .6rem .75rem; min-width: 0; }
.sides { display: grid; gap: .25rem .75rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
.sides > div { min-width: 0; }
.sides span { color: var(--soft); font-size: .8125rem; }
""" + "\n".join(
    f".c{n} {{ stroke: var(--c{n}); }} .dot.c{n}, .legend i.c{n} "
    f"{{ fill: var(--c{n}); background: var(--c{n}); stroke: none; }}"
    for n in range(1, 9)
)

"""The frame and the style sheet of the report; light or dark as the reader's system is."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header><h1>{title}</h1>{summary}</header>
{body}
</main>
</body>
</html>
"""
"""{title}, {style}, {summary} and {body} go in; all but the title are HTML."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #f6f5f1; --card: #ffffff; --ink: #1d2327; --quiet: #66707a; --edge: #e2e0d8;
  --accent: #0f766e; --right: #15803d; --wrong: #b4533c; --heat: #14a091;
  --line-1: #0f766e; --line-2: #d97706; --line-3: #6d5bd0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --card: #1d2226; --ink: #e8e6e1; --quiet: #98a2ab; --edge: #30373d;
    --accent: #2dd4bf; --right: #4ade80; --wrong: #f0997f; --heat: #12897c;
    --line-1: #2dd4bf; --line-2: #fbbf24; --line-3: #a99bff;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 36px 20px 72px; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -0.02em; margin: 0; }
h2 { font-size: 1.3rem; letter-spacing: -0.01em; margin: 52px 0 6px; }
p { margin: 0 0 14px; color: var(--quiet); max-width: 84ch; }
.summary { font-size: 1.05rem; margin: 8px 0 0; }
.quiet { color: var(--quiet); font-weight: 400; }
.cards { display: grid; gap: 14px; margin-top: 28px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 280px), 1fr)); }
.card, figure, pre, details, .classes > div { background: var(--card);
  border: 1px solid var(--edge); border-radius: 12px; }
.card { padding: 16px 18px; }
.card .name { color: var(--quiet); font-size: 0.92rem; }
.card .value { font-size: 2.1rem; font-weight: 650; letter-spacing: -0.03em; line-height: 1.25;
  font-variant-numeric: tabular-nums; }
.card .note { color: var(--quiet); font-size: 0.85rem; min-height: 1.4em; }
.meter { height: 6px; border-radius: 3px; background: var(--edge); margin: 6px 0 9px; }
.meter i { display: block; height: 100%; min-width: 2px; border-radius: 3px;
  background: var(--accent); }
figure { margin: 0; padding: 12px; }
figcaption { font-size: 0.9rem; line-height: 1.4; }
.figures { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); }
.figures figcaption { font-weight: 600; padding: 2px 4px 6px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: 0.92rem; }
.legend i { display: inline-block; width: 18px; height: 4px; border-radius: 2px;
  margin-right: 8px; vertical-align: middle; }
.chart { display: block; width: 100%; height: auto; }
.chart .rule { stroke: var(--edge); stroke-width: 1; }
.chart .tick { fill: var(--quiet); font-size: 13px; }
.chart .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.chart .pale { stroke-width: 1; opacity: 0.35; }
.pictures { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 240px), 1fr)); }
.pictures.answers { grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); }
.pictures.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
.pictures img { display: block; width: 100%; height: auto; border-radius: 7px; }
.card + .pictures { margin-top: 14px; }
.drawn { overflow-x: auto; }
.drawn img { display: block; max-width: 100%; height: auto; border-radius: 7px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; align-content: start; }
.pair figcaption { grid-column: 1 / -1; }
.answer { display: grid; grid-template-columns: 96px 1fr; gap: 2px 14px;
  grid-template-rows: auto 1fr; }
.answer img { grid-row: 1 / 3; }
.answer figcaption { font-weight: 600; }
.answer.wide { grid-template-columns: 104px 1fr; grid-template-rows: auto 1fr; }
.answer.wide figcaption { font-weight: 400; font-size: 0.82rem; margin-top: 8px; }
.guesses { list-style: none; margin: 0; padding: 0; font-size: 0.86rem; line-height: 1.35; }
.guesses li { position: relative; display: flex; justify-content: space-between; gap: 10px;
  padding: 2px 0 5px; color: var(--quiet); }
.guesses .bar { position: absolute; left: 0; bottom: 0; height: 3px; min-width: 1px;
  border-radius: 2px; background: var(--quiet); opacity: 0.45; }
.guesses .right { color: var(--right); font-weight: 600; }
.guesses .right .bar { background: var(--right); opacity: 1; }
.guesses .wrong:first-child .words { color: var(--wrong); }
.guesses .score { font-variant-numeric: tabular-nums; white-space: nowrap; }
.classes { display: grid; gap: 14px; grid-template-columns: minmax(0, 2fr) minmax(0, 1fr); }
.classes > div { padding: 16px 18px; }
.classes p { font-size: 0.92rem; }
@media (max-width: 760px) { .classes { grid-template-columns: minmax(0, 1fr); } }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.grid { width: 100%; border-collapse: separate; border-spacing: 3px; font-size: 0.86rem; }
.grid th { font-weight: 500; color: var(--quiet); padding: 2px 4px; text-align: right; }
.grid th[scope=col] { text-align: center; }
.grid td { text-align: center; padding: 7px 4px; border-radius: 5px; min-width: 34px; }
.grid td[style] { background: color-mix(in srgb, var(--heat) var(--share), var(--card)); }
.grid .held-out { outline: 2px solid var(--line-2); outline-offset: -2px; }
.confused { margin: 0; padding-left: 18px; font-size: 0.92rem; }
.confused li { margin-bottom: 4px; }
.confused b { font-weight: 550; }
pre { padding: 12px 16px; margin: 0 0 18px; overflow-x: auto;
  font: 0.88rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
details { margin-top: 52px; padding: 12px 18px; }
summary { cursor: pointer; color: var(--quiet); }
.numbers { margin-top: 10px; font-size: 0.88rem; }
.numbers th { text-align: left; font-weight: 400; padding: 3px 24px 3px 0; color: var(--quiet); }
"""

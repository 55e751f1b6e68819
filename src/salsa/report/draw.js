// Figures come as plotly's data with colour slots; what is drawn has the colours of the light or the dark page.
const element = (tag, className, text) => { const e = document.createElement(tag); if (className) e.className = className; if (text !== undefined) e.textContent = text; return e; };
const dark = matchMedia("(prefers-color-scheme: dark)");
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const MOST_NAMES = 4;  // more do not fit above a plot on a phone: they stand once above all plots of a kind
const dot = slot => { const e = element("span", "dot"); e.dataset.slot = slot; return e; };
const named = figure => figure.data.filter(trace => trace.name && trace.showlegend !== false);

for (const box of document.querySelectorAll("[data-plots]")) {  // a plot for each figure of a kind
  const names = new Map();
  for (const id of Object.keys(figures).filter(id => id.startsWith(box.dataset.plots + "-"))) {
    const plot = element("div", "plot"); plot.id = id; box.append(plot);
    if (named(figures[id]).length > MOST_NAMES) for (const trace of named(figures[id])) names.set(trace.name, [trace.line?.color ?? trace.marker?.color].flat()[0]);
  }
  if (names.size) {
    const legend = element("p", "legend");
    for (const [name, slot] of names) { const one = element("span"); one.append(dot(String(slot).slice("slot-".length)), name); legend.append(one); }
    box.before(legend);
  }
}
function paint(value, slots) {
  if (typeof value === "string") { const m = /^slot-(\d+)$/.exec(value); return m ? slots[m[1] % slots.length] : value === "slot-ink" ? css("--ink") : value; }
  if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map(v => paint(v, slots));
  if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, paint(v, slots)]));
  return value;
}
function drawOne(id) {
  const slots = css("--slots").split(","), figure = figures[id], own = figure.layout;
  const axis = { gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true };
  Plotly.react(id, paint(figure.data, slots), {
    title: { text: own.title.text, font: { size: 14 }, x: 0.03, xanchor: "left", y: 0.96 },
    xaxis: { ...axis, title: { ...own.xaxis.title, font: { size: 12 } } }, yaxis: { ...axis, title: { ...own.yaxis.title, font: { size: 12 } } },
    font: { color: css("--ink"), family: "system-ui, sans-serif", size: 12 },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 48, r: 12, t: 56, b: 52 },
    ...(own.polar ? { polar: { domain: own.polar.domain, bgcolor: "rgba(0,0,0,0)", radialaxis: { ...own.polar.radialaxis, gridcolor: css("--line"), linecolor: css("--line") },
      angularaxis: { gridcolor: css("--line"), linecolor: css("--line") } } } : {}),
    shapes: paint(own.shapes || [], slots), showlegend: named(figure).length <= MOST_NAMES && named(figure).length > 0,
    legend: { orientation: "h", x: 0, y: 1.14, font: { size: 11 } }, hovermode: "closest", hoverlabel: { align: "left", namelength: -1 },
  }, { responsive: true, displayModeBar: false });
}
function paintDots(inside) {
  const slots = css("--slots").split(",");
  inside.querySelectorAll(".dot").forEach(one => one.style.background = slots[one.dataset.slot % slots.length]);
}
let round = 0;
function drawAll() {  // one plot at a time, so that the page answers in between
  const own = ++round, waiting = [...document.querySelectorAll(".plot")];
  paintDots(document);
  const next = () => { if (own === round && waiting.length) { drawOne(waiting.shift().id); setTimeout(next); } };
  setTimeout(next);
}
function redraw(id) {  // a plot whose turn has not come is drawn then
  if (document.getElementById(id)?.classList.contains("js-plotly-plot")) drawOne(id);
}

// Every arm's rewards where its training first reached a KL that the reader picks.
(() => {
  const data = JSON.parse(document.getElementById("series").textContent), STEPS = 200;
  const find = id => document.getElementById(id);
  const pick = find("yardstick"), slider = find("level"), exact = find("nats"), body = find("matched"), seedRows = find("by-seed");
  const signed = x => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(3), mean = of => of.reduce((a, b) => a + b, 0) / of.length;
  function reached(way, level) {  // linear between two updates; the first time counts
    const { step, kl, values } = way;
    for (let i = 0; i < kl.length; i++) {
      const j = Math.max(i - 1, 0);
      if ((kl[j] - level) * (kl[i] - level) > 0 || (i === 0 && kl[0] !== level)) continue;
      const share = kl[i] === kl[j] ? 1 : (level - kl[j]) / (kl[i] - kl[j]), between = of => of[j] + share * (of[i] - of[j]);
      return { step: between(step), values: values.map(of => of && between(of)) };
    }
    return null;
  }
  function estimate(values) {  // mean and its 95 % interval over seeds, Student's t
    if (!values.length) return null;
    const m = mean(values); if (values.length < 2) return { mean: m };
    const half = data.t[values.length - 2] * Math.sqrt(values.reduce((sum, v) => sum + (v - m) ** 2, 0) / (values.length - 1) / values.length);
    return { mean: m, low: m - half, high: m + half };
  }
  const interval = e => e.low === undefined ? "" : `[${signed(e.low)}, ${signed(e.high)}]`;
  function cell(e, isDifference) {
    const td = element("td", "", e ? signed(e.mean) : "–"); if (!e) return td;
    const word = !isDifference || e.low === undefined ? "" : e.low > 0 ? "better" : e.high < 0 ? "worse" : "open";
    if (e.low !== undefined) td.append(element("small", word, interval(e)));
    return td;
  }
  function name(arm) {
    const td = element("td"); td.append(dot(arm.slot), element("strong", "", arm.name)); return td;
  }
  const present = values => values.filter(v => v !== null && v !== undefined);
  function table(level, of) {
    const read = new Map(data.arms.map(arm => [arm.name, arm.curves[of].map(way => reached(way, level))]));
    const base = read.get(data.baseline) || [];
    const minus = (arm, score) => read.get(arm.name).map((own, seed) => own && base[seed] && own.values[score] !== null && base[seed].values[score] !== null
      ? own.values[score] - base[seed].values[score] : null);
    body.replaceChildren(...data.arms.map(arm => {
      const row = element("tr"), own = present(read.get(arm.name)), where = element("td", own.length ? "" : "soft");
      where.append(own.length ? `update ${mean(own.map(o => o.step)).toFixed(1)}` : "not reached", element("small", "", `${own.length} of ${arm.seeds.length} seeds`));
      row.append(name(arm), where);
      data.scores.forEach((_, score) => {
        row.append(cell(estimate(present(own.map(o => o.values[score])))));
        row.append(arm.name === data.baseline ? element("td", "soft", "baseline") : cell(estimate(present(minus(arm, score))), true));
      });
      return row;
    }));
    seedRows.replaceChildren(...data.arms.filter(arm => arm.name !== data.baseline).flatMap(arm => data.scores.map((score, index) => {
      const row = element("tr"), first = name(arm); first.append(element("small", "", score)); row.append(first);
      minus(arm, index).forEach(d => row.append(element("td", d === null ? "soft" : "", d === null ? "not reached" : signed(d))));
      return row;
    })));
    paintDots(body); paintDots(seedRows);
  }
  let due = 0;
  function show(level) {
    const of = Number(pick.value), plots = data.yardsticks[of].plots;
    slider.setAttribute("aria-valuetext", `${level.toFixed(2)} nats per response`);
    table(level, of);
    cancelAnimationFrame(due);
    due = requestAnimationFrame(() => Object.keys(figures).filter(id => id.startsWith("frontier-")).forEach(id => {
      const had = figures[id].layout.shapes || [], line = id.startsWith(plots);
      figures[id].layout.shapes = line ? [{ type: "line", x0: level, x1: level, yref: "paper", y0: 0, y1: 1, line: { color: "slot-ink", width: 1, dash: "dot" } }] : [];
      if (line || had.length) redraw(id);
    }));
  }
  function range() {  // from where the last arm starts to where the first ends, if there is such a KL
    const ends = data.arms.map(arm => arm.curves[Number(pick.value)].flatMap(way => way.kl)).filter(kl => kl.length).map(kl => [Math.min(...kl), Math.max(...kl)]);
    const most = Math.max(...ends.map(e => e[1])), common = [Math.max(...ends.map(e => e[0])), Math.min(...ends.map(e => e[1]))];
    const step = most > 0 ? Number((most / STEPS).toPrecision(1)) : 1;
    for (const input of [slider, exact]) { input.min = 0; input.max = Math.ceil(Math.max(most, step) / step) * step; input.step = step; }
    exact.step = "any";
    slider.value = (common[0] + common[1]) / 2; exact.value = slider.value;
    show(Number(slider.value));
  }
  slider.oninput = () => { exact.value = slider.value; show(Number(slider.value)); };
  exact.oninput = () => { slider.value = exact.value; show(Number(exact.value)); };
  pick.onchange = range;
  range();
})();

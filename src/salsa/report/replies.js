// Prompt × arm, a row a prompt: sorted by what arms disagree on, or by where proxy and held-out score part.
(() => {
  const data = JSON.parse(document.getElementById("replies").textContent), SHOWN = 10;
  const find = id => document.getElementById(id), range = of => Math.max(...of) - Math.min(...of);
  const order = find("reply-order"), search = find("reply-search"), seed = find("reply-seed"), body = find("reply-rows");
  const number = x => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(2);
  const standard = (reply, score) => (reply[1 + score] - data.scale[score][0]) / data.scale[score][1];
  let rows = [], shown = [], at = 0;
  function gap(replies, score) {  // the arm where proxy and this score, in standard deviations, lie furthest apart
    const all = replies.map(reply => standard(reply, 0) - standard(reply, score));
    const arm = all.reduce((best, value, i) => Math.abs(value) > Math.abs(all[best]) ? i : best, 0);
    return { arm, value: all[arm] };
  }
  function read() {
    rows = data.prompts.map(([place, prompt], i) => {
      const replies = data.replies[Number(seed.value)][i];
      return { place, prompt, replies, spread: range(replies.map(reply => reply[1])), gaps: data.scores.map((_, score) => gap(replies, score)),
        text: [prompt, ...replies.map(reply => data.texts[reply[0]])].join("\n").toLowerCase() };
    });
    arrange();
  }
  function arrange() {
    const [by, score] = order.value.split(":"), word = search.value.trim().toLowerCase();
    const key = { prompt: row => -row.place, spread: row => row.spread, gap: row => Math.abs(row.gaps[Number(score)].value) }[by];
    shown = rows.filter(row => row.text.includes(word)).sort((a, b) => key(b) - key(a) || a.place - b.place);
    at = 0; list();
  }
  function first(row) {
    const td = element("td"), note = element("small", "", `no. ${row.place + 1} · spread ${row.spread.toFixed(2)}`);
    data.scores.slice(1).forEach((name, i) => note.append(element("br"), `${data.scores[0]} − ${name}: ${number(row.gaps[i + 1].value)} sd (${data.arms[row.gaps[i + 1].arm]})`));
    td.append(element("p", "", row.prompt), note); return td;
  }
  function list() {
    body.replaceChildren(...shown.slice(at, at + SHOWN).map(row => {
      const tr = element("tr"); tr.append(first(row));
      row.replies.forEach((reply, arm) => {
        const td = element("td"), name = element("strong", "phone"), scores = data.scores.map((score, i) => `${score} ${number(reply[1 + i])}`).join(" · ");
        name.append(dot(arm), data.arms[arm]);
        td.append(name, element("small", "", scores), element("p", "", data.texts[reply[0]] || "(empty)")); tr.append(td);
      });
      return tr;
    }));
    paintDots(body);
    find("reply-where").textContent = shown.length ? `${at + 1}–${Math.min(at + SHOWN, shown.length)} of ${shown.length}` : "none";
    find("reply-back").disabled = at === 0; find("reply-on").disabled = at + SHOWN >= shown.length;
  }
  seed.onchange = read; order.onchange = arrange; search.oninput = arrange;
  find("reply-back").onclick = () => { at -= SHOWN; list(); };
  find("reply-on").onclick = () => { at += SHOWN; list(); };
  read();
})();

// Every table can be copied as Markdown.
function markdown(table) {
  const plain = cell => {
    const copy = cell.cloneNode(true);
    copy.querySelectorAll(".phone, button").forEach(e => e.remove());
    copy.querySelectorAll("br, small, p").forEach(e => e.before(" "));
    return copy.textContent.replace(/\s+/g, " ").trim().replaceAll("|", "\\|");
  };
  const line = cells => `| ${cells.join(" | ")} |\n`;
  const [head, ...body] = [...table.rows].map(row => [...row.cells].map(plain));
  const rule = head.map((_, column) => column ? "---:" : "---");
  const caption = table.caption ? table.caption.textContent.replace(/\s+/g, " ").trim() + "\n\n" : "";
  return caption + [head, rule, ...body].map(line).join("");
}
async function copyText(text) {
  try { await navigator.clipboard.writeText(text); return true; } catch {  // not allowed on some file:// pages
    const area = element("textarea"); area.value = text; area.style.position = "fixed"; area.style.opacity = 0;
    document.body.append(area); area.select();
    try { return document.execCommand("copy"); } finally { area.remove(); }
  }
}
for (const box of document.querySelectorAll(".scroll")) {
  const table = box.querySelector("table"); if (!table) continue;
  const tools = element("div", "tools"), button = element("button", "copy", "Copy as Markdown"), said = element("span", "soft");
  button.type = "button"; said.setAttribute("role", "status");
  button.onclick = async () => {
    said.textContent = await copyText(markdown(table)) ? "Copied." : "The browser does not allow it: select the table and copy it.";
    button.focus(); setTimeout(() => said.textContent = "", 4000);
  };
  tools.append(button, said); box.after(tools);
}

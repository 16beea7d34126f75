"use strict";
// One state for the whole page: which methods are shown, and which one is lit. Table and pictures follow it.
const $ = (selector, within = document) => within.querySelector(selector);
const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];
const data = JSON.parse($("#data").textContent);
const labels = [...new Set(data.rows.map((row) => row.label))]; // best first
const COLOURED = 8; // methods that have a colour at a time; the others are grey until fewer are shown
const SYMBOLS = ["circle", "square", "triangle", "diamond", "star", "cross", "wye", "hexagon"];
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "4 2", "12 4", "1 4", "6 2 1 2"];
const state = { off: new Set(), filter: "", budget: "" };
const slots = new Map(); // label -> number of its colour, symbol and dash

document.documentElement.classList.add("script");

const named = (row) => (row.label + " " + row.method).toLowerCase();
const visible = (row) =>
  !state.off.has(row.label) && (!state.budget || !row.budget || row.budget === state.budget) && named(row).includes(state.filter);
const shownRows = () => data.rows.filter(visible);
const rowOf = new Map(data.rows.map((row) => [row.label + "\n" + row.budget, row]));
const shownAt = (entry) => {
  const row = rowOf.get(entry.label + "\n" + entry.budget) ?? rowOf.get(entry.label + "\n");
  const there = !state.budget || !entry.budget || entry.budget === state.budget;
  return there && (row ? visible(row) : !state.off.has(entry.label));
};
const digits = (value, count = 4) => (value == null ? "–" : +value.toPrecision(count) + "").replace("-", "−");

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// -- colours: those at the top of what is shown have one, and keep it while they are shown --------------------------
function assign() {
  const shown = new Set(shownRows().map((row) => row.label));
  const top = new Set(shown.has(data.baseline) ? [data.baseline] : []);
  for (const label of shown) if (top.size < COLOURED) top.add(label);
  for (const label of slots.keys()) if (!top.has(label)) slots.delete(label);
  for (const label of labels) {
    if (!top.has(label) || slots.has(label)) continue;
    const taken = new Set(slots.values());
    slots.set(label, d3.range(COLOURED).find((slot) => !taken.has(slot)));
  }
}
function style(label) {
  const slot = slots.get(label);
  if (slot === undefined) return { coloured: false, stroke: "var(--rest)", symbol: "circle", dash: "1 0" };
  return { coloured: true, stroke: `var(--c${slot})`, symbol: SYMBOLS[slot], dash: DASHES[slot] || "1 0" };
}
const SHAPES = { circle: d3.symbolCircle, square: d3.symbolSquare, triangle: d3.symbolTriangle, diamond: d3.symbolDiamond,
  star: d3.symbolStar, cross: d3.symbolCross, wye: d3.symbolWye, hexagon: {
    draw(context, size) {
      const r = Math.sqrt(size / 2.6);
      for (let i = 0; i < 6; ++i) context[i ? "lineTo" : "moveTo"](r * Math.sin((i * Math.PI) / 3), r * Math.cos((i * Math.PI) / 3));
      context.closePath();
    } } };

// -- what is lit: by pointer or by focus, everywhere at once -------------------------------------------------------
function light(label) {
  for (const svg of $$(".plot svg")) {
    svg.classList.toggle("dim", label != null);
    for (const mark of $$("[data-label]", svg)) mark.classList.toggle("lit", mark.dataset.label === label);
  }
  for (const chip of $$(".chip")) chip.classList.toggle("lit", chip.dataset.label === label);
  for (const tr of $$("#runs tbody tr")) tr.classList.toggle("lit", data.rows[tr.dataset.row].label === label);
}
function lights(node, label) {
  for (const name of ["pointerenter", "focusin"]) node.addEventListener(name, () => light(label));
  for (const name of ["pointerleave", "focusout"]) node.addEventListener(name, () => light(null));
}

// -- toolbar -------------------------------------------------------------------------------------------------------
function chips() {
  for (const label of labels) {
    const box = make("input", { type: "checkbox" });
    box.checked = true;
    box.addEventListener("change", () => {
      state.off[box.checked ? "delete" : "add"](label);
      update();
    });
    const swatch = d3.create("svg").attr("width", 26).attr("height", 14).attr("aria-hidden", "true");
    const chip = make("label", { class: "chip" }, box, swatch.node(), make("span", {}, label));
    chip.dataset.label = label;
    lights(chip, label);
    $("#chips").append(make("li", {}, chip));
  }
}
function swatches() {
  for (const chip of $$(".chip")) {
    const { stroke, symbol, dash, coloured } = style(chip.dataset.label);
    const svg = d3.select($("svg", chip));
    svg.selectAll("*").remove();
    svg.append("line").attr("x1", 1).attr("x2", 25).attr("y1", 7).attr("y2", 7).attr("stroke", stroke)
      .attr("stroke-width", 2).attr("stroke-dasharray", dash);
    svg.append("path").attr("d", d3.symbol(SHAPES[symbol], coloured ? 60 : 20)()).attr("transform", "translate(13,7)").attr("fill", stroke);
  }
}
function every(on) {
  for (const chip of $$(".chip")) {
    if (chip.parentNode.hidden) continue;
    $("input", chip).checked = on;
    state.off[on ? "delete" : "add"](chip.dataset.label);
  }
  update();
}

// -- table ---------------------------------------------------------------------------------------------------------
function sortable(table) {
  const heads = $$("thead th", table);
  heads.forEach((head, column) => {
    $("button", head)?.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of heads) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (tr) => tr.cells[column].dataset.v ?? tr.cells[column].textContent;
      const words = head.dataset.kind === "words";
      const sorted = [...table.tBodies[0].rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === "" || y === "") return (x === "") - (y === ""); // what was not measured is last, both ways
        return (up ? 1 : -1) * (words ? x.localeCompare(y, "en", { numeric: true }) : x - y);
      });
      table.tBodies[0].append(...sorted);
      $("#count").textContent = `Sorted by ${$("button", head).textContent}, ${up ? "ascending" : "descending"}`;
    });
  });
}
function fill(within, caption, heads, rows) {
  const table = make("table", {}, make("caption", {}, caption));
  table.append(make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col" }, head)))));
  const line = (cells) => make("tr", {}, ...cells.map((cell, i) => (i ? make("td", {}, cell) : make("th", { scope: "row" }, cell))));
  table.append(make("tbody", {}, ...rows.map(line)));
  $(".scroll", within).replaceChildren(table);
}

// -- all together --------------------------------------------------------------------------------------------------
function update() {
  assign();
  swatches();
  for (const chip of $$(".chip")) {
    chip.parentNode.hidden = !data.rows.some((row) => row.label === chip.dataset.label && named(row).includes(state.filter));
  }
  for (const tr of $$("#runs tbody tr")) tr.hidden = !visible(data.rows[tr.dataset.row]);
  for (const tr of $$("tr[data-of]")) tr.hidden = !shownAt(JSON.parse(tr.dataset.of));
  $("#count").textContent = `${shownRows().length} of ${data.rows.length} shown`;
  redraw();
}
function redraw() {
  for (const entry of pictures) entry.stale = true;
  requestAnimationFrame(() => pictures.forEach((entry) => entry.draw()));
}
function save(name, type, text) {
  const link = make("a", { download: name, href: URL.createObjectURL(new Blob([text], { type })) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
function copy(button) {
  const code = $("pre", button.parentNode);
  const said = (word) => {
    button.textContent = word;
    setTimeout(() => (button.textContent = "Copy"), 2000);
  };
  const choose = () => {
    getSelection().selectAllChildren(code); // where the clipboard is closed: selected, for the reader to copy
    said("Selected");
  };
  navigator.clipboard ? navigator.clipboard.writeText(code.textContent).then(() => said("Copied"), choose) : choose();
}
function theme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const button = $("#theme");
  const isDark = () => (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
  const say = () => (button.textContent = isDark() ? "Light mode" : "Dark mode");
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    say();
  });
  dark.addEventListener("change", say);
  say();
}
function choices(select, entries) {
  for (const [value, text] of entries) select.append(make("option", { value }, text));
}

chips();
$("#filter").addEventListener("input", (event) => {
  state.filter = event.target.value.trim().toLowerCase();
  update();
});
$("#budget").addEventListener("change", (event) => {
  state.budget = event.target.value;
  update();
});
$("#all").addEventListener("click", () => every(true));
$("#none").addEventListener("click", () => every(false));
choices($("#budget"), [["", "all"], ...data.budgets.map((budget) => [budget, budget])]);
choices($("#axis"), data.columns.filter((column) => column.axis).map((column) => [column.key, column.meaning]));
choices($("#view"), [["", "means over sites"], ...(data.sites ?? []).map((entry, i) => [i, `sites of ${data.rows[entry.row].name}`])]);
for (const id of ["axis", "smooth", "log", "view", "match"]) $("#" + id).addEventListener("change", redraw);
$$("table.sortable").forEach(sortable);
for (const tr of $$("#runs tbody tr")) lights(tr, data.rows[tr.dataset.row].label);
for (const button of $$(".copy")) button.addEventListener("click", () => copy(button));
$("#csv").addEventListener("click", () => save("results.csv", "text/csv", data.csv));
$("#json").addEventListener("click", () => save("report.json", "application/json", $("#data").textContent));
theme();
picture("differences", drawDifferences);
picture("cost", drawCost, costNumbers);
picture("loss", drawLoss, lossNumbers);
picture("search", drawSearch);
picture("drift", drawDrift, driftNumbers);
update();
addEventListener("beforeprint", () => {
  for (const details of $$("details")) details.open = true;
  for (const entry of pictures) (entry.near = true), entry.draw();
});

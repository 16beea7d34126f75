"use strict";
// The pictures. They share the state, the colours and the small helpers of app.js, which is read after this file.

// -- pictures ------------------------------------------------------------------------------------------------------
// A picture is drawn when it comes near the window and something has changed since.
const pictures = [];
function picture(id, draw, numbers) {
  const section = $("#" + id);
  if (!section || section.hidden) return;
  const box = $(".plot", section);
  const entry = { stale: true, near: false, width: 0 };
  entry.draw = () => {
    if (!entry.stale || !entry.near) return;
    entry.stale = false;
    entry.width = box.clientWidth;
    const svg = draw(Math.max(260, entry.width));
    box.replaceChildren(svg ?? make("p", { class: "empty" }, "Nothing of this is shown: no method is chosen, or it was not measured."));
    if (svg) finish(svg);
    if (numbers && $("details", section).open) numbers(section);
  };
  if (numbers) $("details", section).addEventListener("toggle", () => numbers(section));
  new IntersectionObserver(([seen]) => {
    entry.near = seen.isIntersecting;
    entry.draw();
  }, { rootMargin: "400px" }).observe(box);
  new ResizeObserver(() => {
    if (box.clientWidth !== entry.width) (entry.stale = true), entry.draw();
  }).observe(box);
  pictures.push(entry);
}
function finish(svg) {
  svg.setAttribute("role", "img");
  nameless(svg);
  svg.addEventListener("input", () => {
    nameless(svg); // the words at the pointer are drawn anew
    light(svg.value?.label ?? null);
  });
}
/** A screen reader has the name of the whole picture and the table of its numbers; the names of marks are for us. */
function nameless(svg) {
  for (const mark of $$("[aria-label]", svg)) {
    if (mark.tagName !== "g") mark.dataset.label = mark.getAttribute("aria-label");
    mark.removeAttribute("aria-label");
  }
}
function plot(width, { height = 380, label, description, marks, ...options }) {
  options.x = { labelOffset: 42, ...options.x };
  return Plot.plot({ width, height, ariaLabel: label, ariaDescription: description, marginBottom: 48, marginTop: 24,
    style: { fontSize: "12px", background: "transparent" }, marks, ...options });
}
const fixed = (value) => ({ value: () => value, scale: null });
const pointed = (points, x, y) => Plot.tip(points,
  Plot.pointer({ x, y, title: "title", maxRadius: 40, lineHeight: 1.4, fill: "var(--raised)", className: "tip" }));
const marked = (points, x, y, s, more = {}) => Plot.dot(points, { x, y, fill: s.stroke, stroke: s.stroke, symbol: s.symbol,
  r: s.coloured ? 5.5 : 3, ariaLabel: (d) => d.label, ...more });
const interval = (row) => (row.low == null ? "" : ` (${digits(row.low)} to ${digits(row.high)})`);
const list = (names) => (names.length > 12 ? `${names.slice(0, 12).join(", ")} and ${names.length - 12} more` : names.join(", "));

/** Where values may lie in the picture: whole intervals, unless they would press the means into a third of it. */
function span(rows) {
  const [low, high] = d3.extent(rows, (row) => row.mean);
  const room = (high - low || Math.abs(high) * 0.05 || 1);
  const ends = [Math.max(d3.min(rows, (r) => r.low ?? r.mean), low - room), Math.min(d3.max(rows, (r) => r.high ?? r.mean), high + room)];
  const nice = d3.scaleLinear().domain(ends).nice().domain();
  return data.percent ? [Math.max(0, nice[0]), Math.min(100, nice[1])] : nice;
}
/** Intervals as lines; an arrow where one goes on outside of the picture. */
function intervals(rows, [low, high], line) {
  const known = rows.filter((row) => row.low != null);
  const up = line === Plot.ruleX;
  const at = up ? "x" : "name";
  const place = (end) => (up ? { x: "x", y: () => end } : { y: "name", x: () => end });
  const arrow = (row, end, turn) => Plot.dot([row], { ...place(end), symbol: "triangle", rotate: turn, r: 4, fill: style(row.label).stroke,
    className: "cut", ariaLabel: () => row.label });
  return known.flatMap((row) => [
    line([row], { [up ? "x" : "y"]: at, [up ? "y1" : "x1"]: Math.max(row.low, low), [up ? "y2" : "x2"]: Math.min(row.high, high), stroke: style(row.label).stroke,
      strokeWidth: up ? 1.5 : 2.5, strokeOpacity: !up || style(row.label).coloured ? 0.85 : 0.35, ariaLabel: () => row.label }),
    ...(row.low < low ? [arrow(row, low, up ? 180 : -90)] : []),
    ...(row.high > high ? [arrow(row, high, up ? 0 : 90)] : []),
  ]);
}

function front(rows, key) {
  const sign = data.higher ? 1 : -1;
  const found = [];
  for (const row of d3.sort(rows, (row) => row[key], (row) => -sign * row.mean)) {
    if (!found.length || sign * row.mean > sign * found.at(-1).mean) found.push(row);
  }
  return found;
}
const axis = () => data.columns.find((column) => column.key === $("#axis").value);
const dearer = (key) => (key === "speed" ? -1 : 1); // of a throughput more is better
const against = () => shownRows().filter((row) => row.mean != null && row[axis().key] != null);

function drawCost(width) {
  const { key, heading, meaning } = axis();
  let rows = against();
  const log = rows.some((row) => row[key] > 0) && d3.max(rows, (r) => r[key]) > 20 * d3.min(rows.filter((r) => r[key] > 0), (r) => r[key]);
  const left = log ? rows.filter((row) => !(row[key] > 0)) : [];
  if (log) rows = rows.filter((row) => row[key] > 0);
  if (!rows.length) return null;
  const best = front(rows.map((row) => ({ ...row, [key]: dearer(key) * row[key] })), key).map((r) => ({ ...r, [key]: dearer(key) * r[key] }));
  $("#front").textContent = `On the front: ${list(best.map((row) => row.name))}.` +
    (left.length ? ` Without a place on this axis, at 0: ${list(left.map((row) => row.name))}.` : "");
  const points = rows.map((row) => ({ ...row, x: row[key], y: row.mean,
    title: `${row.name}\n${data.metric} ${digits(row.mean)}${interval(row)}\n${heading} ${digits(row[key])}` }));
  const domain = span(rows);
  const big = d3.max(points, (p) => p.x) >= 1e4;
  const svg = plot(width, {
    height: Math.min(460, Math.max(320, width * 0.6)), marginLeft: 48, marginRight: 20,
    label: `${data.metric} against ${heading}`,
    description: `Scatter plot of ${points.length} methods. On the Pareto front: ${best.map((row) => row.name).join(", ")}.`,
    x: { type: log ? "log" : "linear", label: `${width < 500 ? heading : meaning} →`, labelAnchor: "center", tickFormat: big ? "~s" : "~g", nice: !log, inset: 14, ticks: width < 500 ? 4 : 7 },
    y: { label: `↑ ${data.metric}`, domain, inset: 8 },
    marks: [
      Plot.gridY({ strokeOpacity: 0.12 }), Plot.gridX({ strokeOpacity: 0.08 }),
      Plot.line(best, { x: key, y: "mean", curve: dearer(key) > 0 ? "step-after" : "step-before", stroke: "var(--edge)", strokeWidth: 1.5, strokeOpacity: 0.6 }),
      ...d3.groups(points, (p) => p.label).filter(([, of]) => of.length > 1).map(([label, of]) =>
        Plot.line(of, { x: "x", y: "y", sort: "x", stroke: style(label).stroke, strokeDasharray: style(label).dash, ariaLabel: () => label })),
      ...intervals(points, domain, Plot.ruleX),
      ...points.map((p) => marked([p], "x", "y", style(p.label))),
      pointed(points, "x", "y"),
    ],
  });
  tags(svg, points.filter((p) => style(p.label).coloured || best.some((b) => b.name === p.name)), width);
  return svg;
}

/** Write names beside points where there is room, the best first. */
function tags(svg, points, width) {
  const [x, y] = [svg.scale("x"), svg.scale("y")];
  const taken = points.map((p) => ({ x0: x.apply(p.x) - 6, x1: x.apply(p.x) + 6, y0: y.apply(p.y) - 6, y1: y.apply(p.y) + 6 }));
  const group = d3.select(svg).append("g").attr("aria-hidden", "true").attr("pointer-events", "none");
  for (const p of points) {
    const text = p.name.length > 26 ? p.name.slice(0, 25) + "…" : p.name;
    const [cx, cy, wide] = [x.apply(p.x), y.apply(p.y), text.length * 6.4];
    const places = [[cx + 10, cy + 4], [cx - 10 - wide, cy + 4], [cx - wide / 2, cy - 10], [cx - wide / 2, cy + 19]];
    for (const [left, base] of places) {
      const box = { x0: left, x1: left + wide, y0: base - 11, y1: base + 3 };
      const clash = taken.some((t) => t.x0 < box.x1 && t.x1 > box.x0 && t.y0 < box.y1 && t.y1 > box.y0);
      if (clash || left < 4 || left + wide > width - 2 || base < 20) continue;
      taken.push(box);
      group.append("text").attr("class", "tag").attr("x", left).attr("y", base).attr("data-label", p.label).text(text);
      break;
    }
  }
}
function costNumbers(section) {
  const { key, heading } = axis();
  const rows = against();
  const signed = rows.map((row) => ({ ...row, [key]: dearer(key) * row[key] }));
  const best = new Set(front(signed, key).map((row) => row.name));
  fill(section, `${data.metric} against ${heading}`, ["method", heading, data.metric, "interval", "Pareto front"],
    rows.map((row) => [row.name, digits(row[key], 6), digits(row.mean), row.low == null ? "–" : `${digits(row.low)} to ${digits(row.high)}`, best.has(row.name) ? "yes" : "no"]));
}

function drawDifferences(width) {
  const found = data.differences.filter((d) => shownAt(d) && d.mean != null).map((d) => ({ ...d, title:
    `${d.name}\n${digits(d.mean)}${interval(d) || ", equal on every item"}\n${d.real ? "real" : "not settled at this sample size"}` }));
  if (!found.length) return null;
  const short = (name) => (name.length > 24 ? name.slice(0, 23) + "…" : name);
  const margin = Math.min(190, width * 0.42, 16 + 6.8 * d3.max(found, (d) => short(d.name).length));
  const limit = 2.5 * d3.max(found, (d) => Math.abs(d.mean)) || 1;
  const [low, high] = [Math.max(-limit, d3.min(found, (d) => Math.min(0, d.low ?? d.mean))), Math.min(limit, d3.max(found, (d) => Math.max(0, d.high ?? d.mean)))];
  return plot(width, {
    height: 70 + 24 * found.length, marginLeft: margin, marginRight: 16,
    label: `Difference from ${data.baseline} in ${data.metric}, with intervals`,
    description: found.map((d) => d.title.replaceAll("\n", " ")).join("; "),
    x: { label: [data.higher ? "← worse" : "← better", ...(width < 500 ? [] : [`difference from ${short(data.baseline)}, ${data.metric}`]), data.higher ? "better →" : "worse →"].join("     "),
      labelAnchor: "center", domain: [low, high], inset: 8, ticks: width < 500 ? 4 : 8 },
    y: { type: "band", domain: found.map((d) => d.name), label: null, tickFormat: short, tickSize: 0 },
    marks: [
      Plot.gridX({ strokeOpacity: 0.12 }), Plot.ruleX([0], { stroke: "currentColor", strokeWidth: 1.5 }),
      ...intervals(found, [low, high], Plot.ruleY),
      ...found.map((d) => marked([d], "mean", "name", style(d.label), { fill: d.real ? style(d.label).stroke : "var(--paper)", strokeWidth: 2, r: 5 })),
      pointed(found, "mean", "name"),
    ],
  });
}

function running(values) {
  const half = Math.max(1, Math.floor(values.length / 40));
  const sums = d3.cumsum([0, ...values]);
  return values.map((_, i) => {
    const [a, b] = [Math.max(0, i - half), Math.min(values.length, i + half + 1)];
    return (sums[b] - sums[a]) / (b - a);
  });
}
function drawLoss(width) {
  const [smooth, log] = [$("#smooth").checked, $("#log").checked];
  const line = (row, losses, steps = row.loss.steps) => {
    const values = smooth ? running(losses) : losses;
    return steps.map((x, i) => ({ x, y: values[i], label: row.label, title: `${row.name}\nstep ${digits(x, 6)}: ${digits(values[i])}` }))
      .filter((p) => !log || p.y > 0);
  };
  const rows = shownRows().filter((row) => row.loss.mean.length);
  if (!rows.length) return null;
  const order = d3.sort(rows, (row) => style(row.label).coloured); // grey below, colours above
  const thin = order.filter((row) => style(row.label).coloured).flatMap((row) => row.loss.seeds.map((seed) =>
    Plot.line(line(row, ...seed), { x: "x", y: "y", stroke: style(row.label).stroke, strokeWidth: 0.8, strokeOpacity: 0.35, ariaLabel: () => row.label })));
  const means = order.map((row) => [row, line(row, row.loss.mean)]);
  return plot(width, {
    height: Math.min(460, Math.max(320, width * 0.55)), marginLeft: 48, marginRight: 16,
    label: "Training loss by optimizer step, penalties of methods included",
    description: `${rows.length} lines, the mean over seeds of: ${list(rows.map((row) => row.name))}.`,
    x: { label: "optimizer step →", labelAnchor: "center", ticks: width < 500 ? 4 : 8 },
    y: { label: "↑ training loss, penalties included", type: log ? "log" : "linear", nice: true, tickFormat: "~g" },
    marks: [
      Plot.gridY({ strokeOpacity: 0.12 }), ...thin,
      ...means.map(([row, points]) => Plot.line(points, { x: "x", y: "y", stroke: style(row.label).stroke, ariaLabel: () => row.label,
        strokeWidth: style(row.label).coloured ? 2.2 : 1, strokeDasharray: style(row.label).dash, strokeOpacity: style(row.label).coloured ? 1 : 0.6 })),
      pointed(means.flatMap(([, points]) => points), "x", "y"),
    ],
  });
}
function lossNumbers(section) {
  fill(section, "Training loss, mean over seeds", ["method", "at the first step", "half way", "lowest", "mean of the last tenth"],
    shownRows().filter((row) => row.loss.mean.length).map((row) => {
      const losses = row.loss.mean;
      const last = losses.slice(-Math.ceil(losses.length / 10));
      return [row.name, digits(losses[0]), digits(losses[losses.length >> 1]), digits(d3.min(losses)), digits(d3.mean(last))];
    }));
}

/** The tried rates that have room for their names on a logarithmic axis. */
function ticks(rates, width) {
  const sorted = d3.sort(new Set(rates));
  const [low, high] = d3.extent(sorted, Math.log);
  const apart = (54 * (high - low)) / width;
  const found = [];
  for (const rate of sorted) if (!found.length || Math.log(rate) - Math.log(found.at(-1)) >= apart) found.push(rate);
  return found;
}
function drawSearch(width) {
  const found = data.searches.filter(shownAt);
  const points = found.flatMap((s) => s.points.map((p) => ({ ...p, label: s.label, name: s.name, chosen: p.x === s.chosen,
    title: `${s.name}\nlearning rate ${digits(p.x, 3)}: ${p.y == null ? p.why : digits(p.y)}` +
    (p.share < 1 ? `\nstopped after ${digits(100 * p.share, 3)} % of the epochs` : "") +
    (p.x === s.chosen ? `\nchosen${s.edge ? `, the ${s.edge} of its grid` : ""}` : "") })));
  const good = points.filter((p) => p.y != null);
  if (!good.length) return null;
  const rates = ticks(points.map((p) => p.x), width - 100);
  const rate = (value) => (value < 0.01 ? (+value.toPrecision(2)).toExponential().replace("-", "−") : digits(value, 2));
  const groups = d3.sort(d3.groups(good, (p) => p.name), ([, [first]]) => style(first.label).coloured);
  return plot(width, {
    height: Math.min(440, Math.max(320, width * 0.5)), marginLeft: 48, marginRight: 20,
    label: `Validation ${found[0].metric} by learning rate`,
    description: found.map((s) => `${s.name}: ${s.chosen == null ? "none" : digits(s.chosen, 3)} chosen${s.edge ? ", at the edge" : ""}`).join("; "),
    x: { type: "log", label: "learning rate →", labelAnchor: "center", tickFormat: rate, ticks: rates, inset: 12 },
    y: { label: `↑ validation ${found[0].metric}`, nice: true, inset: 8 },
    marks: [
      Plot.gridY({ strokeOpacity: 0.12 }),
      ...groups.flatMap(([, of]) => {
        const s = style(of[0].label);
        return [
          Plot.line(of, { x: "x", y: "y", stroke: s.stroke, strokeWidth: s.coloured ? 1.8 : 1, strokeDasharray: s.dash, strokeOpacity: s.coloured ? 0.9 : 0.5, ariaLabel: (d) => d.label }),
          marked(of.filter((p) => p.share === 1), "x", "y", s, { r: s.coloured ? 4 : 2.5 }),
          marked(of.filter((p) => p.share < 1), "x", "y", s, { r: s.coloured ? 4 : 2.5, fill: "var(--paper)" }),
          Plot.dot(of.filter((p) => p.chosen), { x: "x", y: "y", r: s.coloured ? 9 : 5, stroke: s.stroke, strokeWidth: s.coloured ? 2 : 1, ariaLabel: (d) => d.label }),
        ];
      }),
      Plot.text(points.filter((p) => p.y == null && p.why !== "not defined"), { x: "x", frameAnchor: "bottom", text: fixed("✕").value, fill: "currentColor", ariaLabel: (d) => d.label }),
      pointed(good, "x", "y"),
    ],
  });
}

function drifts() {
  const match = $("#match").value;
  const view = $("#view").value;
  const line = (row, title, x, y, steps, more) => ({ row, ...more, points: steps.map((step, i) => ({ x: x[i], y: y[i], step, label: row.label,
    title: `${title}, step ${step}\nΔD ${digits(x[i], 3)}, ΔΣ ${digits(y[i], 3)}` })).filter((p) => p.x != null && p.y != null) });
  if (view === "") {
    return shownRows().filter((row) => row.drift).flatMap((row) => row.drift.seeds.map((seed, i) =>
      line(row, `${row.name}, seed ${seed}`, row.drift[match][i], row.drift.delta_sigma[i], row.drift.steps[i], { name: row.name, seed, site: "mean of all", thick: true })));
  }
  const entry = data.sites[view];
  const row = data.rows[entry.row];
  return entry.sites.map((site, j) => line(row, site, entry[match].map((v) => v[j]), entry.delta_sigma.map((v) => v[j]), entry.steps,
    { name: row.name, seed: entry.seed, site, thick: false }));
}
function drawDrift(width) {
  const lines = drifts().filter((l) => l.points.length);
  if (!lines.length) return null;
  return plot(width, {
    height: Math.min(460, Math.max(320, width * 0.55)), marginLeft: 56, marginRight: 20,
    label: "Change of singular values against turn of singular vectors in training",
    description: `${lines.length} trajectories of ${list([...new Set(lines.map((l) => l.name))])}.`,
    x: { label: "ΔD →", labelAnchor: "center", ticks: width < 500 ? 4 : 8, inset: 8, tickFormat: "~g" },
    y: { label: "↑ ΔΣ", inset: 8, tickFormat: "~g" },
    marks: [
      Plot.gridY({ strokeOpacity: 0.12 }), Plot.gridX({ strokeOpacity: 0.08 }),
      ...d3.sort(lines, (l) => style(l.row.label).coloured).flatMap((l) => {
        const s = style(l.row.label);
        return [
          Plot.line(l.points, { x: "x", y: "y", stroke: s.stroke, strokeWidth: l.thick && s.coloured ? 1.8 : 0.9, strokeOpacity: l.thick ? 0.9 : 0.5, strokeDasharray: s.dash, ariaLabel: (d) => d.label }),
          Plot.dot(l.points, { x: "x", y: "y", r: 1.7, fill: s.stroke, ariaLabel: (d) => d.label }),
          ...(l.thick ? [marked(l.points.slice(-1), "x", "y", s)] : []),
        ];
      }),
      pointed(lines.flatMap((l) => l.points), "x", "y"),
    ],
  });
}
function driftNumbers(section) {
  const rows = drifts().flatMap((l) => (l.points.length ? [l.points.at(-1)] : []).map((p) => [l.name, l.seed + "", l.site, p.step + "", digits(p.x, 3), digits(p.y, 3)]));
  fill(section, "Where the trajectories end", ["method", "seed", "site", "step", "ΔD", "ΔΣ"], rows);
}

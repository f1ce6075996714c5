// Plots as inline SVG. Colours and fonts come from the style sheet.

const SHAPES = {
  lattice: (r) => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`,
  orbit: (r) => `M${-r} ${-r}h${2 * r}v${2 * r}h${-2 * r}z`,
  half: (r) => `M0 ${-r}L${r} ${r}H${-r}z`,
  raw: (r) => `M0 ${-1.2 * r}L${1.2 * r} 0 0 ${1.2 * r}L${-1.2 * r} 0z`,
  birkhoff: (r) => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`,
};

function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function canvas(width, height, title) {
  return svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
}

/** Round values that divide a range into about `count` parts. */
export function ticks(low, high, count) {
  const rough = (high - low || 1) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(Number((k * step).toPrecision(12)));
  return found;
}

/** One dot a tensor in the model's order; its area grows with the tensor, its shape tells the coding. */
export function dots(width, rows, { name, label, form, title }) {
  const base = { sensitivity: 10, bits_per_weight: 2 }[name]; // of the scale; none: a linear one
  const height = width < 500 ? 240 : 300, [left, right, top, bottom] = [46, 10, 12, 34];
  const scaled = (row) => (base ? Math.log(row[name]) / Math.log(base) : row[name]);
  const drawn = rows.map((row, at) => ({ row, at })).filter(({ row }) => row[name] != null && (!base || row[name] > 0));
  const values = drawn.map(({ row }) => scaled(row));
  const low = Math.min(...values), high = Math.max(...values);
  const pad = 0.06 * (high - low || 1), from = low - pad, to = high + pad;
  const x = (at) => left + ((at + 0.5) / rows.length) * (width - left - right);
  const y = (value) => height - bottom - ((value - from) / (to - from)) * (height - top - bottom);
  const chart = canvas(width, height, `${title}: ${drawn.length} tensors, from ${form(Math.min(...drawn.map(({ row }) => row[name])))} to ${form(Math.max(...drawn.map(({ row }) => row[name])))}. The table below has all values.`);
  const marks = base ? ticks(Math.ceil(from), Math.floor(to), 5).filter(Number.isInteger) : ticks(from, to, 5);
  for (const value of marks) {
    chart.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
    chart.append(svg("text", { class: "tick", x: left - 8, y: y(value) + 4, "text-anchor": "end" }, base === 10 ? `1e${value}` : String(base ? base ** value : value)));
  }
  for (const zone of zonesOf(rows)) {
    const start = x(zone.from - 0.5), end = x(zone.to - 0.5);
    if (zone.from) chart.append(svg("line", { class: "zone", x1: start, x2: start, y1: top, y2: height - bottom + 6 }));
    if (end - start > 6.4 * zone.name.length)
      chart.append(svg("text", { class: "tick", x: (start + end) / 2, y: height - 12, "text-anchor": "middle" }, zone.name));
  }
  const largest = Math.max(...rows.map((row) => Math.sqrt(count(row))));
  // Large ones first, so that small ones are seen before them.
  for (const { row, at } of drawn.sort((a, b) => count(b.row) - count(a.row))) {
    const radius = (width < 500 ? 1.6 : 2.2) + (width < 500 ? 5 : 7) * (Math.sqrt(count(row)) / largest);
    const shape = (SHAPES[row.encoding] ?? SHAPES.lattice)(Number(radius.toFixed(1)));
    const mark = svg("path", { class: `dot dot-${row.encoding}`, d: shape, transform: `translate(${x(at).toFixed(1)} ${y(scaled(row)).toFixed(1)})` });
    mark.append(svg("title", {}, `${row.name} (${row.shape.join(" × ") || "1"}), ${row.encoding}: ${form(row[name])}`));
    chart.append(mark);
  }
  return chart;
}

const count = (row) => row.shape.reduce((product, side) => product * side, 1);

/** The model's parts, as ranges of tensors. */
function zonesOf(rows) {
  const zones = [];
  rows.forEach(({ name }, at) => {
    const part = name.split(".", 1)[0];
    if (zones.at(-1)?.name === part) zones.at(-1).to = at + 1;
    else zones.push({ name: part, from: at, to: at + 1 });
  });
  return zones;
}

const ROW = 34, LABEL = 100;

/** Horizontal bars with their values written beside. */
export function bars(width, rows) {
  const chart = canvas(width, ROW * rows.length + 4, rows.map(({ label, text }) => `${label} ${text}`).join(", "));
  const most = Math.max(...rows.map(({ value }) => value)), room = width - LABEL - 78;
  rows.forEach((row, k) => {
    const y = ROW * k + ROW / 2 + 2, length = Math.max(2, (row.value / most) * room);
    chart.append(
      svg("text", { class: row.own ? "name own" : "name", x: 0, y: y + 4 }, row.label),
      svg("rect", { class: row.own ? "bar own" : "bar", x: LABEL, y: y - 9, width: length, height: 18, rx: 3 }),
      svg("text", { class: "tick", x: LABEL + length + 7, y: y + 4 }, row.text),
    );
  });
  return chart;
}

/** Values up to 1 with the intervals about them. */
export function intervals(width, rows) {
  const height = ROW * rows.length + 26;
  const chart = canvas(width, height, rows.map(({ label, value }) => `${label} ${value.toFixed(4)}`).join(", "));
  const low = Math.min(0.98, ...rows.map(({ value, margin }) => value - margin));
  const x = (value) => LABEL + ((value - low) / (1 - low)) * (width - LABEL - 70);
  for (const value of ticks(low, 1, width < 420 ? 2 : 4)) {
    chart.append(svg("line", { class: "grid", x1: x(value), x2: x(value), y1: 2, y2: height - 22 }));
    chart.append(svg("text", { class: "tick", x: x(value), y: height - 6, "text-anchor": "middle" }, String(value)));
  }
  rows.forEach((row, k) => {
    const y = ROW * k + ROW / 2 + 2, own = row.own ? " own" : "";
    const [from, to] = [Math.max(low, row.value - row.margin), Math.min(1, row.value + row.margin)];
    chart.append(
      svg("text", { class: `name${own}`, x: 0, y: y + 4 }, row.label),
      svg("line", { class: `whisker${own}`, x1: x(from), x2: x(to), y1: y, y2: y }),
      svg("circle", { class: `mean${own}`, cx: x(row.value), cy: y, r: 5.5 }),
      svg("text", { class: "tick", x: width - 60, y: y + 4 }, row.value.toFixed(4)),
    );
  });
  return chart;
}

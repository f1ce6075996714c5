// A compression's report: figures, plots and the tensors as a table.

import { bars, dots, intervals } from "./plots.js";
import { element, fixed, isOriginal, seconds, size, times, whole } from "./words.js";

const METRICS = [
  ["bits_per_weight", "Bits a weight", (v) => v.toFixed(2)],
  ["sqnr_db", "SQNR, dB", (v) => `${v.toFixed(1)} dB`],
  ["sensitivity", "Sensitivity", (v) => v.toExponential(1)],
];
const YARDSTICKS = { int8: "int8 by row", int4: "int4 by 128" };

/** Show a report (of a model or of a plan) in `root`. */
export function showReport(root, report, title) {
  const models = report.fidelity?.models ?? {};
  root.replaceChildren(figures(report, models.compressed), ...notices(report), tensors(report, title));
  const small = element("div", { className: "charts" });
  root.append(small);
  const yardsticks = Object.keys(YARDSTICKS).filter((name) => name in models).map((name) => [name, models[name]]);
  const sizes = [
    { label: "Checkpoint", value: report.source_bytes },
    ...yardsticks.map(([name, { nbytes }]) => ({ label: YARDSTICKS[name], value: nbytes })),
    { label: "This model", value: report.artifact_bytes, own: true },
  ];
  small.append(chart("Size", (width) => bars(width, sizes.map((row) => ({ ...row, text: size(row.value) })))));
  if (!models.compressed) return;
  const agreement = [
    ...yardsticks.map(([name, row]) => ({ label: YARDSTICKS[name], value: row.mask_iou, margin: row.margin })),
    { label: "This model", value: models.compressed.mask_iou, margin: models.compressed.margin, own: true },
  ];
  small.append(chart("Mask IoU with the original, and 95 % interval", (width) => intervals(width, agreement)));
}

function figures(report, found) {
  const rows = [
    ["Variant", report.variant],
    ["Size", `${size(report.source_bytes)} → ${size(report.artifact_bytes)}`],
    ["Smaller than the file", times(report.ratio)],
    ["Smaller than fp32", times(report.fp32_ratio)],
    ["Bits a weight", report.bits_per_weight == null ? null : fixed(report.bits_per_weight, 2)],
    ["SQNR", report.sqnr_db == null ? null : `${fixed(report.sqnr_db, 1)} dB`],
    ["Mask IoU", found && `${fixed(found.mask_iou, 4)} ± ${fixed(found.margin, 4)}`],
    ["Mask IoU, worst tenth", found && fixed(found.worst_tenth, 3)],
    ["Embedding cosine", found && fixed(found.embedding_cosine, 5)],
    ["Values", whole(report.parameters)],
    ["In memory", report.resident_bytes == null ? null : size(report.resident_bytes)],
    ["Codec", isOriginal(report) ? "none, stored as it is" : report.codec],
    ["Took", seconds(report.seconds)],
  ];
  const shown = rows.filter(([, value]) => value);
  return element("dl", { className: "cards" }, ...shown.map(([term, value]) =>
    element("div", {}, element("dt", { textContent: term }), element("dd", { textContent: value }))));
}

function notices(report) {
  return (report.notices ?? []).map((text) => element("p", { className: "notice", textContent: text }));
}

function tensors(report, title) {
  const rows = report.tensors;
  const known = METRICS.filter(([name]) => rows.some((row) => row[name] != null));
  const [switcher, radios] = metricSwitch(known);
  const figure = element("figure", { className: "chart wide" });
  const caption = element("figcaption", {}, element("strong", { textContent: "Every tensor, in the model's order" }), switcher);
  const holder = element("div", { className: "plot" });
  figure.append(caption, holder, legend(rows), table(rows));
  const draw = (width) => {
    const [name, label, form] = known.find((_, k) => radios[k].checked);
    return dots(width, rows, { name, label, form, title: `${label} of each tensor of ${title}` });
  };
  redrawn(holder, draw);
  switcher.addEventListener("change", () => holder.replaceChildren(draw(holder.clientWidth)));
  return figure;
}

function metricSwitch(known) {
  const radios = known.map(([value], k) => element("input", { type: "radio", name: "metric", value, checked: k === 0 }));
  const legendText = element("legend", { className: "sr", textContent: "What is plotted" });
  const labels = known.map(([, label], k) => element("label", {}, radios[k], element("span", { textContent: label })));
  return [element("fieldset", { className: "switch" }, legendText, ...labels), radios];
}

function legend(rows) {
  const counts = Map.groupBy ? Map.groupBy(rows, (row) => row.encoding) : grouped(rows);
  const items = [...counts].map(([name, all]) => element("li", { className: `key-${name}`, textContent: `${name}: ${all.length}` }));
  return element("ul", { className: "legend", ariaLabel: "Codings" }, ...items);
}

function grouped(rows) {
  const found = new Map();
  for (const row of rows) found.set(row.encoding, [...(found.get(row.encoding) ?? []), row]);
  return found;
}

function table(rows) {
  const details = element("details", { className: "tensors" }, element("summary", { textContent: `${rows.length} tensors as a table` }));
  details.addEventListener("toggle", () => {
    if (!details.open || details.querySelector("table")) return;
    const heads = ["Tensor", "Shape", "Coding", "Bits", "SQNR, dB", "Sensitivity"];
    const head = element("tr", {}, ...heads.map((text) => element("th", { scope: "col", textContent: text })));
    const body = rows.map((row) => element("tr", {},
      element("th", { scope: "row", textContent: row.name }),
      ...[row.shape.join(" × ") || "1", row.encoding, fixed(row.bits_per_weight, 2), fixed(row.sqnr_db, 1),
        row.sensitivity == null ? "–" : row.sensitivity.toExponential(1)].map((text) => element("td", { textContent: text }))));
    const made = element("table", {}, element("thead", {}, head), element("tbody", {}, ...body));
    details.append(element("div", { className: "scroll", tabIndex: 0, role: "region", ariaLabel: "Tensors" }, made));
  });
  return details;
}

function chart(title, draw) {
  const holder = element("div", { className: "plot" });
  redrawn(holder, draw);
  return element("figure", { className: "chart" }, element("figcaption", {}, element("strong", { textContent: title })), holder);
}

/** Drawn for the width that there is, so that letters keep their size. */
function redrawn(holder, draw) {
  let width = 0;
  new ResizeObserver(() => {
    if (!holder.clientWidth || holder.clientWidth === width) return;
    width = holder.clientWidth;
    holder.replaceChildren(draw(width));
  }).observe(holder);
}

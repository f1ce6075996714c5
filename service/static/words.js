// Numbers as people read them.

const plain = new Intl.NumberFormat("en-GB");

export const whole = (value) => plain.format(value);
export const fixed = (value, digits) => (value == null ? "–" : value.toFixed(digits));

/** Bytes in decimal units. */
export function size(bytes) {
  for (const [unit, name] of [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"]])
    if (bytes >= unit) return `${(bytes / unit).toFixed(bytes / unit < 100 ? 1 : 0)} ${name}`;
  return `${bytes} B`;
}

export function seconds(value) {
  if (value < 90) return `${Math.max(1, Math.round(value))} s`;
  return value < 5400 ? `${Math.round(value / 60)} min` : `${(value / 3600).toFixed(1)} h`;
}

/** A factor with as many digits as tell something. */
export const times = (value) => `${value < 100 ? value.toFixed(value < 10 ? 2 : 1) : Math.round(value)}×`;

/** Whether a model's weights are stored as they are. */
export const isOriginal = (report) => report.encoded_share === 0;
export const modelTitle = ({ id, artifact_bytes, report }) =>
  `${id} · ${isOriginal(report) ? "original" : times(report.ratio)} · ${size(artifact_bytes)}`;

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** Put a list of [value, text] into a select, keeping what was chosen where it is still there. */
export function fillSelect(select, options, wanted = select.value) {
  select.replaceChildren(...options.map(([value, text]) => element("option", { value, textContent: text })));
  if (options.some(([value]) => value === wanted)) select.value = wanted;
  select.disabled = options.length === 0;
  if (select.disabled) select.append(element("option", { value: "", textContent: "none yet" }));
}

export function save(blob, name) {
  const link = element("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

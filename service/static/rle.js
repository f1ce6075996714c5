// COCO's compressed run-length encoding: runs of 0 and 1 in turn, beginning with 0, down the columns one after another.

/** The run lengths of a mask. Each is written in groups of five bits, from the third on as the difference to the one two before. */
export function runsOf({ counts }) {
  const runs = [];
  let at = 0;
  while (at < counts.length) {
    let value = 0, shift = 0, group;
    do {
      group = counts.charCodeAt(at++) - 48;
      value += (group & 31) * 2 ** shift; // no <<, which ends at 31 bits
      shift += 5;
    } while (group & 32);
    if (group & 16) value -= 2 ** shift;
    runs.push(runs.length > 2 ? value + runs[runs.length - 2] : value);
  }
  return runs;
}

/** Of two masks of one size, from their runs alone: intersection over union, 1 where both are empty, and pixels that differ. */
export function compared(first, second) {
  const ends = [endsOf(runsOf(first)), endsOf(runsOf(second))];
  const index = [0, 0];
  let at = 0, both = 0, either = 0;
  const total = first.size[0] * first.size[1];
  while (at < total) {
    const next = Math.min(ends[0][index[0]] ?? total, ends[1][index[1]] ?? total);
    const inside = (index[0] & 1) + (index[1] & 1);
    if (inside === 2) both += next - at;
    if (inside > 0) either += next - at;
    at = next;
    for (const k of [0, 1]) while (ends[k][index[k]] <= at && index[k] < ends[k].length) index[k]++;
  }
  return { iou: either ? both / either : 1, differ: either - both };
}

function endsOf(runs) {
  let end = 0;
  return runs.map((run) => (end += run));
}

/**
 * The mask in rows of 0 and 1. With `step` only every so many rows and columns, for masks that are larger than the
 * screen: the work then follows the pixels shown and the number of runs, not the picture's pixels.
 */
export function decode(mask, step = 1) {
  const [height, width] = mask.size;
  const rows = Math.ceil(height / step), columns = Math.ceil(width / step);
  const data = new Uint8Array(rows * columns);
  let at = 0, inside = false;
  for (const run of runsOf(mask)) {
    if (inside) fill(at, at + run);
    at += run;
    inside = !inside;
  }
  return { data, width: columns, height: rows };

  function fill(from, to) {
    for (let column = Math.floor(from / height); column * height < to; column++) {
      if (column % step) continue;
      const first = Math.max(0, from - column * height), last = Math.min(height, to - column * height);
      for (let row = Math.ceil(first / step) * step; row < last; row += step) data[(row / step) * columns + column / step] = 1;
    }
  }
}

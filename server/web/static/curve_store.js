// The points of a job's curves in the browser: those that the server sent, and those of live events.

const MAX_EXTRA_POINTS = 2000; // live points before the curves are reduced again

/** The values of a progress event by curve; the same as `training_curves.measured` on the server. */
function measured(fields, names) {
  const prefix = fields.eval_loss == null ? "rewards" : "eval_rewards";
  const values = { ...fields };
  for (const [name, value] of Object.entries(fields.rewards ?? {})) values[`${prefix}_${name}`] = value;
  const memory = Object.values(fields.memory ?? {}).reduce((sum, bytes) => sum + bytes, 0);
  values.peak_memory_bytes = memory || null;
  return Object.fromEntries(names.filter((name) => values[name] != null).map((name) => [name, values[name]]));
}

export class CurveStore {
  /** @param {string[]} names of the curves */
  constructor(names) {
    this.names = names;
    this.axis = "step";
    this.clear();
  }

  clear() {
    this.curves = Object.fromEntries(this.names.map((name) => [name, { x: [], y: [], ...(this.axis !== "step" && { steps: [] }) }]));
    this.restarts = [];
    this.attempt = 0;
    this.origin = null;
    this.seconds = 0;
    this.lastStep = -1;
    this.numExtra = 0;
  }

  /** Replace all points by a response of the server. */
  load(response, axis) {
    this.axis = axis;
    this.clear();
    for (const [name, points] of Object.entries(response.curves)) {
      if (name in this.curves) this.curves[name] = points;
    }
    this.restarts = response.restarts;
    this.attempt = response.attempt;
    this.origin = response.origin;
    this.lastStep = response.last_step ?? -1;
    this.seconds = response.last_seconds ?? 0;
  }

  get isEmpty() {
    return this.names.every((name) => this.curves[name].x.length === 0);
  }

  /**
   * Add the points of a progress event.
   * @returns {boolean} whether the curves must be loaded again: an attempt has started, or there are many new points
   */
  add(event) {
    if (event.step == null || (event.loss == null && event.eval_loss == null)) return false;
    if (event.attempt !== this.attempt) return true;
    this.origin ??= event.created_at;
    const end = (new Date(event.created_at) - new Date(this.origin)) / 1000;
    const singles = event.steps ?? [];
    const parts = new Map([[event.step, measured(event, this.names)]]);
    for (const single of singles) parts.set(single.step, { ...parts.get(single.step), ...measured(single, this.names) });
    const steps = [...parts.keys()].sort((a, b) => a - b);
    const start = Math.min(this.seconds, end);
    steps.forEach((step, number) => {
      const seconds = start + ((end - start) * (number + 1)) / steps.length;
      this.put(step, parts.get(step), seconds);
    });
    this.seconds = end;
    return this.numExtra > MAX_EXTRA_POINTS;
  }

  put(step, values, seconds) {
    const tokens = values.tokens ?? this.tokens;
    this.tokens = tokens;
    const x = { step, tokens, seconds }[this.axis];
    if (x == null) return;
    for (const [name, value] of Object.entries(values)) {
      const curve = this.curves[name];
      putPoint(curve, x, value, step);
      if (curve.means) putPoint(curve.means, x, value, step);
    }
    if (step > this.lastStep) this.numExtra += 1;
    this.lastStep = Math.max(step, this.lastStep);
  }
}

/** Append a point to a curve, or replace the one at the same place. */
function putPoint(curve, x, value, step) {
  const { x: xs, y: ys } = curve;
  if (xs.length && xs[xs.length - 1] >= x) {
    const index = xs.lastIndexOf(x);
    if (index >= 0) ys[index] = value;
    return;
  }
  xs.push(x);
  ys.push(value);
  curve.steps?.push(step);
}

const SMOOTHED_PARTS = 1000; // of the visible range

/**
 * The smoothed line of a curve, by exponential smoothing; the first values are not pulled towards zero.
 *
 * A reduced curve is smoothed through the means of its parts, because its points are the extremes. A point may stand
 * for several steps: those since the previous point. It counts accordingly, so the line does not depend on how often
 * the run reported its steps.
 * @param {{x: number[], y: number[], steps?: number[], means?: object}} curve
 * @param {number} keep the share of the line that is kept at each step, or at each thousandth of a longer range
 */
export function smoothed(curve, keep) {
  const { x, y, steps = x } = curve.means ?? curve;
  const unit = Math.max(1, (steps[steps.length - 1] - steps[0]) / SMOOTHED_PARTS);
  let sum = 0;
  let total = 0;
  const line = y.map((value, index) => {
    const kept = keep ** ((index ? steps[index] - steps[index - 1] : 1) / unit);
    sum = kept * sum + (1 - kept) * value;
    total = kept * total + (1 - kept);
    return sum / total;
  });
  return { x, y: line };
}

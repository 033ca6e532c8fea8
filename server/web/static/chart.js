// One chart: curves on a canvas, and for everyone who can't see it, a sentence and a table with the same values.
import { duration } from "./app.js";
import { smoothed } from "./curve_store.js";

const TABLE_ROWS = 12;
const COUNT_STEPS = Array.from({ length: 15 }, (_, power) => [1, 2, 5].map((digit) => digit * 10 ** power)).flat();
const BYTE_STEPS = Array.from({ length: 30 }, (_, power) => 2 ** (20 + power));
const TIME_STEPS = [1, 2, 5, 10, 15, 30, ...[1, 2, 5, 10, 15, 30].map((n) => 60 * n), ...[1, 2, 4, 6, 12, 24, 48, 96, 168].map((n) => 3600 * n)];

const units = {
  plain: (value) => (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5) || value === 0 ? trim(value.toPrecision(4)) : value.toExponential(2),
  count: (value) => new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(value),
  bytes: (value) => (value >= 2 ** 30 ? `${trim((value / 2 ** 30).toPrecision(3))} GiB` : `${trim((value / 2 ** 20).toPrecision(3))} MiB`),
  share: (value) => `${trim((100 * value).toPrecision(3))} %`,
};
const clock = new Intl.DateTimeFormat("en-GB", { timeZone: "UTC", hour: "2-digit", minute: "2-digit" });
const dayAndClock = new Intl.DateTimeFormat("en-GB", { timeZone: "UTC", day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" });
const DAY_SECONDS = 86400;

/** How each axis shows a position: in a sentence, in the table, and below the chart. ``clock`` is a time since 1970. */
const axes = {
  step: { heading: "Step", inSentence: (x) => `step ${x.toLocaleString("en")}`, inTable: (x) => x.toLocaleString("en") },
  tokens: { heading: "Tokens", inSentence: (x) => `${x.toLocaleString("en")} tokens`, inTable: (x) => x.toLocaleString("en") },
  seconds: { heading: "Time", inSentence: duration, inTable: duration, tick: duration },
  clock: {
    heading: "Time (UTC)",
    inSentence: (x) => dayAndClock.format(1000 * x),
    inTable: (x) => dayAndClock.format(1000 * x),
    tick: (x) => (x % DAY_SECONDS === 0 ? dayAndClock.format(1000 * x).split(",")[0] : clock.format(1000 * x)),
  },
};
const compact = new Intl.NumberFormat("en", { notation: "compact" });

function trim(text) {
  return text.includes(".") && !text.includes("e") ? text.replace(/\.?0+$/, "") : text;
}

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** The points for uPlot. Where more than ``maxGap`` lies between two points, the line is interrupted. */
function withGaps({ x, y, maxGap = Infinity }) {
  const xs = [];
  const ys = [];
  x.forEach((position, index) => {
    if (index && position - x[index - 1] > maxGap) {
      xs.push((position + x[index - 1]) / 2);
      ys.push(null);
    }
    xs.push(position);
    ys.push(y[index]);
  });
  return [xs, ys];
}

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** The value of a custom property as a colour that a canvas understands: light-dark() is resolved by the browser. */
function resolved(name) {
  const probe = element("span");
  probe.className = `probe-${name.slice(2)}`;
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value || color(name);
}

export class Chart {
  /**
   * @param {object} definition `{title, curves: [{name, label, color}], unit, isLoss, isLarge, fromZero, top}`
   * @param {{zoom: function}} handlers
   */
  constructor(definition, handlers) {
    this.definition = definition;
    this.handlers = handlers;
    const id = `chart-${definition.curves[0].name}`;
    this.legend = element("p", { class: "legend", "aria-hidden": "true" });
    this.plotElement = element("div", { class: "plot", "aria-hidden": "true" });
    this.summary = element("p", { class: definition.isLarge ? "summary" : "visually-hidden" });
    this.table = element("table");
    this.details = element("details", {}, element("summary", {}, "Values as a table"), this.table);
    this.element = element(
      "figure",
      { class: definition.isLarge ? "chart large" : "chart", "aria-labelledby": id, id: `figure-${definition.curves[0].name}` },
      element("figcaption", {}, element("h2", { id }, definition.title), this.legend),
      this.plotElement,
      this.summary,
      this.details,
    );
    this.details.addEventListener("toggle", () => this.fillTable());
    new ResizeObserver(() => this.resize()).observe(this.plotElement);
  }

  /** Draw the curves of a `CurveStore` with these options: `{smoothing, log}`. */
  draw(store, options) {
    const { curves, isLoss } = this.definition;
    this.axis = store.axis;
    this.restarts = store.restarts;
    const isLog = Boolean(isLoss && options.log);
    this.shown = curves.map((curve) => ({ ...curve, ...store.curves[curve.name] })).filter((curve) => curve.x.length);
    this.element.hidden = this.shown.length === 0;
    if (this.element.hidden) return;
    this.series = [];
    this.shown.forEach((curve) => {
      const number = curve.color ?? curves.findIndex(({ name }) => name === curve.name) + 1;
      const drawable = (values) => (isLog ? values.map((value) => (value > 0 ? value : null)) : values);
      const isSmoothed = curve.smooth && options.smoothing > 0 && curve.y.length > 2;
      this.series.push({ ...curve, y: drawable(curve.y), color: number, isFaint: isSmoothed });
      if (!isSmoothed) return;
      const line = smoothed(curve, options.smoothing);
      this.series.push({ ...curve, x: line.x, y: drawable(line.y), color: number, isSmooth: true });
    });
    const data = uPlot.join(this.series.map((curve) => withGaps(curve)));
    const layout = JSON.stringify([isLog, this.axis, this.series.map(({ name, isFaint, isSmooth, y }) => [name, isFaint, isSmooth, y.length < 2])]);
    if (!this.plot || layout !== this.layout) {
      this.plot?.destroy();
      this.layout = layout;
      this.plot = new uPlot(this.options(isLog), data, this.plotElement);
    } else {
      this.plot.setData(data);
    }
    this.describe();
    this.showLegend(null);
    if (this.details.open) this.fillTable();
  }

  options(isLog) {
    const format = units[this.definition.unit];
    const axis = { stroke: resolved("--muted"), grid: { stroke: resolved("--grid"), width: 1 }, ticks: { stroke: resolved("--grid"), width: 1 }, font: "12px system-ui, sans-serif" };
    const { top } = this.definition;
    const { tick = (x) => compact.format(x) } = axes[this.axis];
    return {
      width: this.plotElement.clientWidth,
      height: this.plotElement.clientHeight,
      legend: { show: false },
      cursor: { sync: { key: "curves" }, drag: { x: Boolean(this.handlers.zoom), y: false, setScale: false }, points: { size: 6 } },
      scales: { x: { time: false }, y: isLog ? { distr: 3 } : this.definition.fromZero ? { range: (_, __, max) => [0, top ?? (max > 0 ? 1.15 * max : 1)] } : {} },
      axes: [
        { ...axis, values: (_, ticks) => ticks.map(tick), space: 70, size: 34, incrs: this.axis === "seconds" || this.axis === "clock" ? TIME_STEPS : COUNT_STEPS },
        { ...axis, values: (_, ticks) => ticks.map((tick) => (tick == null ? "" : format(tick))), size: this.definition.unit === "bytes" ? 76 : 62, ...(this.definition.unit === "bytes" && { incrs: BYTE_STEPS }) },
      ],
      series: [{}, ...this.series.map((curve) => this.seriesOptions(curve))],
      hooks: {
        setSelect: [(plot) => plot.select.width > 3 && this.handlers.zoom(plot.posToVal(plot.select.left, "x"), plot.posToVal(plot.select.left + plot.select.width, "x"))],
        setCursor: [(plot) => this.showLegend(plot.cursor.idx)],
        draw: [(plot) => this.markRestarts(plot)],
      },
    };
  }

  seriesOptions(curve) {
    const stroke = resolved(`--series-${curve.color}`);
    const isSparse = curve.hasPoints || curve.y.length < 2;
    return {
      stroke: curve.isFaint ? stroke.replace("rgb(", "rgba(").replace(")", ", 0.3)") : stroke,
      width: curve.isFaint ? 1 : 1.75,
      spanGaps: !curve.maxGap,
      points: { show: isSparse, size: 5, fill: stroke },
    };
  }

  /** A dashed line with the number of the attempt where a run was continued. */
  markRestarts(plot) {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = resolved("--muted");
    ctx.setLineDash([4, 4]);
    ctx.textAlign = "left";
    ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
    for (const { x, attempt } of this.restarts) {
      if (x == null || x < plot.scales.x.min || x > plot.scales.x.max) continue;
      const left = plot.valToPos(x, "x", true);
      ctx.beginPath();
      ctx.moveTo(left, bbox.top);
      ctx.lineTo(left, bbox.top + bbox.height);
      ctx.stroke();
      ctx.fillText(`attempt ${attempt}`, left + 4 * devicePixelRatio, bbox.top + 11 * devicePixelRatio);
    }
    ctx.restore();
  }

  /** The values at the cursor, or the newest ones. */
  showLegend(index) {
    if (!this.plot) return;
    const format = units[this.definition.unit];
    const entries = [];
    const xs = this.plot.data[0];
    if (index != null) entries.push(element("span", { class: "plain" }, axes[this.axis].inSentence(Math.round(xs[index] * 10) / 10)));
    this.series.forEach((curve, number) => {
      if (curve.isFaint) return;
      const ys = this.plot.data[number + 1];
      let at = index ?? ys.length - 1;
      while (at >= 0 && ys[at] == null) at -= 1;
      if (at >= 0) entries.push(element("span", { class: `series-${curve.color}` }, `${curve.label}${curve.isSmooth ? " (smoothed)" : ""} ${format(ys[at])}`));
    });
    this.legend.replaceChildren(...entries);
  }

  describe() {
    const format = units[this.definition.unit];
    const label = axes[this.axis].inSentence;
    const sentences = this.shown.map(({ label: name, x, y }) => {
      const last = y.length - 1;
      if (last === 0) return `${name}: ${format(y[0])} at ${label(x[0])}.`;
      const lowest = y.reduce((best, value, index) => (value < y[best] ? index : best), 0);
      const highest = y.reduce((best, value, index) => (value > y[best] ? index : best), 0);
      if (y[lowest] === y[highest]) return `${name} stayed at ${format(y[0])} from ${label(x[0])} to ${label(x[last])}.`;
      const verb = y[last] < y[0] ? "fell" : y[last] > y[0] ? "rose" : "went";
      return `${name} ${verb} from ${format(y[0])} at ${label(x[0])} to ${format(y[last])} at ${label(x[last])}; lowest ${format(y[lowest])} at ${label(x[lowest])}, highest ${format(y[highest])} at ${label(x[highest])}.`;
    });
    const restarts = this.restarts.map(({ attempt, step }) => ` Attempt ${attempt} continued at step ${step}.`).join("");
    const text = sentences.join(" ") + restarts;
    if (this.summary.textContent !== text) this.summary.textContent = text;
  }

  fillTable() {
    if (!this.details.open || !this.shown?.length) return;
    const format = units[this.definition.unit];
    const xs = [...new Set(this.shown.flatMap(({ x }) => x))].sort((a, b) => a - b);
    const count = Math.min(TABLE_ROWS, xs.length);
    const chosen = Array.from({ length: count }, (_, row) => xs[Math.round((row * (xs.length - 1)) / Math.max(1, count - 1))]);
    const head = element("tr", {}, element("th", { scope: "col" }, axes[this.axis].heading), ...this.shown.map(({ label }) => element("th", { scope: "col" }, label)));
    const rows = chosen.map((x) =>
      element("tr", {}, element("th", { scope: "row" }, axes[this.axis].inTable(x)), ...this.shown.map((curve) => {
        const index = curve.x.indexOf(x);
        return element("td", {}, index < 0 ? "–" : format(curve.y[index]));
      })),
    );
    this.table.replaceChildren(element("thead", {}, head), element("tbody", {}, ...rows));
  }

  resize() {
    const { clientWidth: width, clientHeight: height } = this.plotElement;
    if (this.plot && width && (width !== this.plot.width || height !== this.plot.height)) this.plot.setSize({ width, height });
  }

  /** Forget the drawing, so that the next one uses the current colours. */
  reset() {
    this.layout = undefined;
  }
}

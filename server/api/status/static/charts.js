// One chart: a uPlot over some columns of the ring, and a legend that is also its table of values.

const uPlot = window.uPlot;
const LONGEST_S = 900, SHORTEST_S = 120;
// Steps between lines of a grid of bytes: 1, 2, 4 ... of each unit.
const BINARY = Array.from({ length: 50 }, (_, power) => 2 ** power);
const sync = uPlot.sync("terrace");

export const clock = (unix, style) => new Date(unix * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hourCycle: "h23", ...style });

export function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

export function element(tag, classes, text) {
  const node = document.createElement(tag);
  if (classes) node.className = classes;
  if (text !== undefined) node.textContent = text;
  return node;
}

// `series`: {key, label, color, dashed, constant}; `stacked`: areas, the first one lowest. `show` makes a value text.
export class Chart {
  constructor(id, { series, show, stacked = false, signed = false, binary = false, least = 1 }) {
    this.root = document.getElementById(id);
    this.title = this.root.parentNode.querySelector("h2").textContent;
    this.series = series;
    this.show = show;
    this.stacked = stacked;
    this.signed = signed;
    this.binary = binary;
    this.least = least;
    this.plot = null;
    this.points = null;
    this.place = this.root.appendChild(element("div", "plot"));
    this.place.setAttribute("role", "img");
    this.legend = this.root.appendChild(element("ul", "legend"));
    this.values = series.map((one) => this.addToLegend(one));
    new ResizeObserver(() => this.resize()).observe(this.place);
  }

  addToLegend(one) {
    const item = this.legend.appendChild(element("li"));
    const mark = this.stacked ? "area" : one.dashed ? "line dashed" : "line";
    item.appendChild(element("span", `${mark} c-${one.color}`)).setAttribute("aria-hidden", "true");
    item.appendChild(element("span", "", one.label));
    return item.appendChild(element("b", "", "–"));
  }

  // The same series but for those that this daemon does not have.
  keep(keys) {
    this.series.forEach((one, i) => { this.legend.children[i].hidden = !keys.has(one.key); });
    const wanted = this.series.filter((one) => keys.has(one.key));
    if (this.drawn && wanted.length === this.drawn.length) return;
    this.drawn = wanted;
    this.rebuild();
  }

  rebuild() {
    if (this.plot) { this.plot.destroy(); this.plot = null; }
    if (this.points) this.draw(this.points);
  }

  draw(points) {
    this.points = points;
    const shown = this.drawn || this.series;
    const columns = shown.map((one) => one.constant === undefined ? points[one.key] : points.time.map(() => one.constant));
    const data = [points.time, ...(this.stacked ? stack(columns) : columns)];
    if (!this.plot) this.plot = new uPlot(this.options(shown), data, this.place);
    else this.plot.setData(data);
    if (this.plot.cursor.idx == null) this.tell(points.time.length - 1);
  }

  // Values of one point go into the legend, and, of the newest, into what a screen reader says.
  tell(index) {
    const texts = this.series.map((one) => {
      const value = one.constant === undefined ? this.points[one.key][index] : one.constant;
      return value == null ? "–" : this.show(value);
    });
    texts.forEach((text, i) => { if (this.values[i].textContent !== text) this.values[i].textContent = text; });
    const said = this.series.map((one, i) => this.legend.children[i].hidden ? "" : `${one.label} ${texts[i]}`).filter(Boolean);
    this.place.setAttribute("aria-label", `${this.title} Chart of the last 15 minutes; now: ${said.join(", ")}`);
  }

  options(shown) {
    const axis = { stroke: css("muted"), font: "11px system-ui, sans-serif", ticks: { show: false }, grid: { stroke: css("grid"), width: 1 } };
    const drawn = shown.map((one) => ({
      stroke: css(one.color),
      width: this.stacked ? 0 : 1.6,
      fill: this.stacked ? css(one.color) : undefined,
      dash: one.dashed ? [5, 4] : undefined,
      points: { show: false },
      spanGaps: false,
    }));
    return {
      width: this.place.clientWidth, height: this.place.clientHeight, legend: { show: false }, padding: [8, 24, 0, 0],
      cursor: { sync: { key: sync.key }, drag: { x: false, y: false }, points: { show: !this.stacked }, y: false },
      scales: {
        x: { time: true, range: (u, min, max) => [max - Math.min(LONGEST_S, Math.max(SHORTEST_S, max - min)), max] },
        y: { range: (u, min, max) => this.range(min, max) },
      },
      axes: [
        { ...axis, space: 64, size: 22, values: (u, ticks) => ticks.map((tick) => clock(tick, tick % 60 ? { second: "2-digit" } : {})) },
        {
          ...axis, size: 58, gap: 4, space: 22, ...(this.binary ? { incrs: BINARY } : {}),
          values: (u, ticks) => ticks.map((tick) => tick === 0 ? "0" : this.show(tick)),
        },
      ],
      series: [{}, ...(this.stacked ? drawn.reverse() : drawn)],
      hooks: { setCursor: [(u) => this.tell(u.cursor.idx ?? this.points.time.length - 1)] },
    };
  }

  range(min, max) {
    const top = Math.max(max ?? 0, this.least) * 1.08;
    return [this.signed && min < 0 ? min * 1.08 : 0, top];
  }

  resize() {
    const { clientWidth: width, clientHeight: height } = this.place;
    if (this.plot && width && (width !== this.plot.width || height !== this.plot.height)) this.plot.setSize({ width, height });
  }
}

// Sums from below, the whole first: every area is painted over the one behind it.
function stack(columns) {
  const sums = [];
  let below = columns[0].map(() => 0);
  for (const column of columns) {
    below = column.map((value, i) => value == null ? null : below[i] + value);
    sums.push(below);
  }
  return sums.reverse();
}

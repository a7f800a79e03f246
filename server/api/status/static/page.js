// The live page: reads /status/stream, keeps the last 15 minutes, shows them. Text is only ever set as text.

import { Chart, clock, element } from "./charts.js";

const POINTS = 900, KEY = "terrace-key";
const RETRY_S = [1, 2, 5, 10];
const TIERS = ["device", "dram", "ssd"];
const SIGNS = { good: "✓", watch: "▲", bad: "✕", idle: "–" };
const at = (id) => document.getElementById(id);

// --- numbers as people read them ---

const thin = "\u202f";
const digits = (value, most) => value.toLocaleString("en", { maximumFractionDigits: most });
const count = (value) => digits(value, value < 10 && value % 1 ? 1 : 0);

function scaled(value, step, units) {
  let size = Math.abs(value), unit = 0;
  while (size >= step && unit < units.length - 1) { size /= step; unit += 1; }
  return `${value < 0 ? "−" : ""}${digits(size, size < 10 && unit ? 1 : 0)}${units[unit] ? thin + units[unit] : ""}`;
}
const bytes = (value) => scaled(value, 1024, ["B", "KiB", "MiB", "GiB", "TiB"]);
const perSecond = (value) => scaled(value, 1000, ["", "k", "M"]);
const rate = (value) => `${bytes(value)}/s`;

function seconds(value) {
  const size = Math.abs(value), sign = value < 0 ? "−" : "";
  if (size === 0) return "0" + thin + "s";
  if (size < 0.9995) return `${sign}${digits(size * 1000, size < 0.01 ? 1 : 0)}${thin}ms`;
  return `${sign}${digits(size, size < 10 ? 2 : size < 100 ? 1 : 0)}${thin}s`;
}

function duration(value) {
  const units = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const first = units.findIndex(([, size]) => value >= size);
  if (first < 0) return "0 s";
  const [name, size] = units[first];
  const next = units[first + 1];
  const rest = next && Math.floor((value % size) / next[1]);
  return `${Math.floor(value / size)} ${name}${rest ? ` ${rest} ${next[0]}` : ""}`;
}

// --- what is drawn ---

const percentiles = (name) => [
  { key: `${name}_p50`, label: "p50", color: "accent" },
  { key: `${name}_p99`, label: "p99", color: "second" },
  { key: `${name}_target`, label: "target", color: "bad", dashed: true, constant: null },
];
const charts = {
  ttft: new Chart("ttft", { series: percentiles("ttft"), show: seconds, least: 0.01 }),
  tpot: new Chart("tpot", { series: percentiles("tpot"), show: seconds, least: 0.002 }),
  work: new Chart("work", {
    series: [
      { key: "running", label: "running", color: "accent" },
      { key: "waiting", label: "waiting", color: "ssd", dashed: true },
    ],
    show: count, least: 4,
  }),
  sources: new Chart("sources", {
    series: [...TIERS.map((tier) => ({ key: tier, label: tier, color: tier })), { key: "computed", label: "computed", color: "computed" }],
    show: perSecond, stacked: true, least: 10,
  }),
  saved: new Chart("saved", {
    series: TIERS.map((tier) => ({ key: `saved_${tier}`, label: tier, color: tier })), show: seconds, signed: true, least: 0.01,
  }),
  made: new Chart("made", { series: [{ key: "generated", label: "generated", color: "accent" }], show: perSecond, least: 10 }),
  moves: new Chart("moves", {
    series: [
      { key: "down", label: "down", color: "accent" },
      { key: "up", label: "up", color: "second", dashed: true },
    ],
    show: rate, binary: true, least: 1024,
  }),
  written: new Chart("written", {
    series: [{ key: "written", label: "written", color: "ssd" }], show: rate, binary: true, least: 1024,
  }),
};

let points = null, newest = null, drawnTiers = "";

function draw() {
  if (document.hidden || !points || !newest) return;
  const tiers = newest.tiers.map((tier) => tier.name);
  if (tiers.join() !== drawnTiers) {
    drawnTiers = tiers.join();
    charts.sources.keep(new Set([...tiers, "computed"]));
    charts.saved.keep(new Set(tiers.map((tier) => `saved_${tier}`)));
  }
  for (const name of ["ttft", "tpot"]) {
    const target = newest.latency_last_minute[name].target_s;
    charts[name].series[2].constant = target;
    charts[name].keep(new Set([`${name}_p50`, `${name}_p99`, ...(target === null ? [] : [`${name}_target`])]));
  }
  at("moves-card").hidden = !newest.hops.length;
  at("ssd-card").hidden = !newest.ssd;
  for (const chart of Object.values(charts)) if (!chart.root.closest("[hidden]")) chart.draw(points);
}

function add(point) {
  if (!points || point.time <= points.time[points.time.length - 1]) return;
  for (const [name, column] of Object.entries(points)) {
    column.push(point[name]);
    if (column.length > POINTS) column.shift();
  }
}

// --- the parts that are not charts ---

function put(node, text) { if (node.textContent !== text) node.textContent = text; }

function showHead(status) {
  put(at("model"), status.model);
  put(at("uptime"), duration(status.uptime_s));
  put(at("version"), status.version);
  put(at("state"), status.state);
  at("state").className = `badge ${status.state === "ready" ? "good" : status.state === "failed" ? "bad" : "watch"}`;
  const worst = ["bad", "watch"].find((level) => status.verdicts.some((verdict) => verdict.level === level));
  document.title = `${worst ? `${SIGNS[worst]} ` : ""}${status.model} · Terrace`;
}

// A number stays on one line with its unit.
const unbroken = (text) => text.replace(/(\d) (%|[a-zA-Z]{1,3}\b)/g, "$1\u00a0$2");

function showVerdicts(verdicts) {
  const place = at("verdicts");
  verdicts.forEach((verdict, i) => {
    const told = JSON.stringify([verdict.level, verdict.answer, verdict.why]);
    if (place.children[i] && place.children[i].dataset.told === told) return;
    const card = element("article", `verdict ${verdict.level}`);
    card.dataset.told = told;
    card.append(element("h2", "", verdict.question));
    const answer = element("p", "answer");
    const sign = element("span", "sign", SIGNS[verdict.level]);
    sign.setAttribute("aria-hidden", "true");
    answer.append(sign, verdict.answer);
    const why = element("ul");
    for (const line of verdict.why) why.append(element("li", "", unbroken(line)));
    card.append(answer, why);
    if (place.children[i]) place.replaceChild(card, place.children[i]);
    else place.append(card);
  });
}

function showTiers(tiers) {
  at("tiers").replaceChildren(...tiers.map((tier) => {
    const node = element("div", "tier");
    const share = tier.used_bytes / tier.capacity_bytes, held = tier.referenced_blocks / tier.capacity_blocks;
    const head = element("div", "head");
    const name = element("span", "name", `${tier.name} `);
    if (!tier.up) name.append(element("span", "off", "✕ off"));
    head.append(name, element("span", "", `${bytes(tier.used_bytes)} of ${bytes(tier.capacity_bytes)} · ${digits(share * 100, 0)}${thin}%`));
    const bar = element("div", `bar c-${tier.name}`);
    bar.setAttribute("aria-hidden", "true");
    for (const [part, classes] of [[held, "held"], [Math.max(0, share - held), "kept"]]) {
      const piece = element("i", classes);
      piece.style.width = `${part * 100}%`;
      bar.append(piece);
    }
    const foot = element("div", "foot");
    const net = tier.saved_last_minute_s - tier.cost_last_minute_s;
    foot.append(
      element("span", "", `${count(tier.used_blocks)} of ${count(tier.capacity_blocks)} blocks`),
      element("span", "", `saves ${seconds(net)} a minute`),
    );
    node.append(head, bar, foot);
    return node;
  }));
}

// The first `left` cells hold words, the others numbers.
function row(cells, left = 1) {
  const node = element("tr");
  cells.forEach((cell, i) => node.append(element("td", i < left ? "left" : "", cell)));
  return node;
}

function showHops(hops) {
  at("hops").replaceChildren(...hops.map((hop) => row([
    `${hop.source} → ${hop.target}`, rate(hop.bytes_per_s), `${count(hop.in_flight_blocks)} blocks`, bytes(hop.waiting_bytes),
  ])));
}

function showSsd(ssd) {
  if (!ssd) return;
  put(at("ssd-since"), ssd.since % 86400 === 0 ? "since midnight UTC" : `since the start at ${clock(ssd.since)}`);
  const budget = ssd.budget_bytes_per_day;
  const node = element("div", "tier"), head = element("div", "head");
  head.append(
    element("span", "name", bytes(ssd.written_today_bytes)),
    element("span", "", budget ? `${digits((ssd.written_today_bytes / budget) * 100, 0)}${thin}% of ${bytes(budget)} a day` : "no budget set"),
  );
  node.append(head);
  if (budget) {
    const bar = element("div", "bar c-ssd"), piece = element("i");
    bar.setAttribute("aria-hidden", "true");
    piece.style.width = `${Math.min(100, (ssd.written_today_bytes / budget) * 100)}%`;
    bar.append(piece);
    node.append(bar);
  }
  at("ssd").replaceChildren(node);
}

function showLive(live) {
  const admin = live.sees === "all";
  const named = live.requests.some((one) => one.tenant && one.tenant !== "other");
  const shown = live.requests.length;
  const notes = {
    all: live.count > shown ? `the oldest ${shown} of ${live.count} requests` : `${live.count} requests, oldest first`,
    own: live.count > shown ? `the oldest ${shown} of your ${live.count} requests` : `your ${live.count} requests, oldest first`,
    none: "only an admin key shows requests",
  };
  put(at("requests-note"), notes[live.sees]);
  document.querySelector(".requests .tenant").hidden = !named;
  at("requests").replaceChildren(...live.requests.map((one) => {
    const cached = Object.entries(one.cached_tokens_by_tier).filter(([, tokens]) => tokens);
    return row([
      one.id || "–", ...(named ? [one.tenant] : []), one.background ? `${one.phase}, background` : one.phase, seconds(one.age_s),
      count(one.prompt_tokens), cached.map(([tier, tokens]) => `${tier} ${count(tokens)}`).join(", ") || "0", count(one.generated_tokens),
    ], named ? 3 : 2);
  }));
  showWarnings(live.warnings);
  at("steer").hidden = !admin;
}

function showWarnings(warnings) {
  put(at("warnings-note"), warnings ? "newest first" : "only an admin key shows the log");
  const told = JSON.stringify(warnings);
  if (at("warnings").dataset.told === told) return;
  at("warnings").dataset.told = told;
  if (warnings && !warnings.length) at("warnings").replaceChildren(element("li", "empty", "Nothing since the start."));
  else at("warnings").replaceChildren(...(warnings || []).map((one) => {
    const item = element("li");
    item.append(element("time", "", clock(one.time_s, { second: "2-digit" })), element("b", one.level, one.level), one.message);
    if (one.count > 1) item.append(` (${one.count} times)`);
    return item;
  }));
}

function show(status) {
  newest = status;
  add(status.point);
  showHead(status);
  showVerdicts(status.verdicts);
  showTiers(status.tiers);
  showHops(status.hops);
  showSsd(status.ssd);
  draw();
}

// --- the stream ---

const sleep = (s) => new Promise((done) => setTimeout(done, s * 1000));
const headers = () => {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
};

function link(text, level) {
  put(at("link"), text);
  at("link").className = `badge ${level}`;
  document.body.classList.toggle("stale", level !== "good");
}

function take(block) {
  const fields = Object.fromEntries(block.split("\n").map((line) => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 2)]));
  if (!fields.data) return;
  const data = JSON.parse(fields.data);
  if (fields.event === "history") { points = data; draw(); }
  else if (fields.event === "status") show(data);
  else if (fields.event === "live") showLive(data);
}

let current = null;

async function read(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    blocks.forEach(take);
  }
}

async function follow() {
  for (let tries = 0; ; tries += 1) {
    let wait = RETRY_S[Math.min(tries, RETRY_S.length - 1)];
    current = new AbortController();
    try {
      const answer = await fetch("status/stream", { headers: headers(), signal: current.signal, cache: "no-store" });
      if (answer.status === 401) { link("needs a key", "watch"); await askKey(); tries = -1; continue; }
      if (answer.status === 429) { link("too many pages are open", "watch"); await sleep(10); continue; }
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      link("live", "good");
      tries = -1;
      await read(answer.body);
      link("the stream ended", "watch");
    } catch (error) {
      if (error.name === "AbortError") { wait = 0; tries = -1; }
      else link("no connection, trying again", "bad");
    }
    await sleep(wait);
  }
}

// --- keys and what an admin may do ---

// The value of the button that was pressed; "yes" for Enter in a field, "no" for Escape. The dialog's `close` event comes
// too late to go by: by then the dialog may be open for another question.
function answerOf(dialog) {
  if (!dialog.open) dialog.showModal();
  return new Promise((done) => {
    const over = new AbortController();
    const end = (value) => { over.abort(); dialog.close(); done(value); };
    const on = (name, answer) => dialog.addEventListener(name, (event) => {
      const value = answer(event);
      if (value) { event.preventDefault(); end(value); }
    }, { signal: over.signal });
    on("click", (event) => event.target.closest("button")?.value);
    on("submit", () => "yes");
    on("cancel", () => "no");
  });
}

async function askKey() {
  at("key-input").value = "";
  at("key-forget").hidden = !sessionStorage.getItem(KEY);
  const answer = await answerOf(at("key-dialog"));
  const key = at("key-input").value.trim();
  if (answer === "forget") sessionStorage.removeItem(KEY);
  else if (answer === "yes" && key) sessionStorage.setItem(KEY, key);
  if (answer !== "no") current?.abort();
}
at("key-button").addEventListener("click", askKey);

async function ask(title, text, yes) {
  put(at("ask-title"), title);
  put(at("ask-text"), text);
  put(at("ask-yes"), yes);
  return await answerOf(at("ask-dialog")) === "yes";
}

async function act(path, body) {
  const sent = { method: "POST", headers: headers() };
  if (body) { sent.body = JSON.stringify(body); sent.headers["Content-Type"] = "application/json"; }
  try {
    const answer = await fetch(path, sent);
    const told = await answer.json();
    put(at("steer-result"), answer.ok ? `${count(told.blocks)} blocks are forgotten.` : `Refused: ${told.error.message}`);
  } catch {
    put(at("steer-result"), "No answer came; the connection is lost.");
  }
}

at("clear-button").addEventListener("click", async () => {
  const text = "Everything that no request uses and no pin keeps is forgotten, in all tiers. The next prompts are computed anew.";
  if (await ask("Empty the cache?", text, "Empty it")) await act("v1/cache/clear");
});
at("evict-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const tenant = at("evict-tenant").value.trim();
  const body = { prompt: at("evict-prompt").value, ...(tenant ? { tenant } : {}) };
  const text = "What is cached of this prompt is forgotten in all tiers, as far as no request uses it and no pin keeps it.";
  if (await ask("Forget this prompt?", text, "Forget it")) await act("v1/cache/evict", body);
});

document.addEventListener("visibilitychange", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => Object.values(charts).forEach((chart) => chart.rebuild()));
follow();

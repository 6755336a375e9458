"use strict";
// All data are inserted as text (textContent), never as markup.

const STAGES = ["SUMMARY", "CAPTION", "REASONING", "REFLECTION", "CONCLUSION"];
const PER_PAGE = { reading: 12, gallery: 84 };
const $ = (id) => document.getElementById(id);

// ---- data: gzip, base64, in chunks of images that are unpacked on demand ----

const texts = new Map(); // chunk -> its images' candidates, most recently used last
const KEPT_CHUNKS = 24;

async function unpack(id) {
  const bytes = Uint8Array.from(atob($(id).textContent.trim()), (char) => char.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

async function candidatesOf(chunk) {
  const found = texts.get(chunk) ?? (await unpack("text" + chunk));
  texts.delete(chunk);
  texts.set(chunk, found);
  if (texts.size > KEPT_CHUNKS) texts.delete(texts.keys().next().value);
  return found;
}

function thumbnail(image) {
  const lines = $("thumb" + Math.floor(image / index.chunk)).textContent.trim().split("\n");
  return lines[image % index.chunk];
}

let anyAsked; // whether any image has candidates: the others are hidden by default
let index; // {domains, classes, names, rules, chunk, images: [[path, domain, class, [rule or -1 …]] …]}

// ---- state: in the URL, so that a view can be bookmarked and shared ----

const FIELDS = ["domain", "label", "verdict", "rule", "search"];
let state = { domain: "", label: "", verdict: "", rule: "", search: "", view: "reading", page: 0 };
let shown = []; // indices of the images that match the filters
let run = 0; // incremented on every change, so that an outdated search stops

function load() {
  const params = new URLSearchParams(location.hash.slice(1));
  for (const key of [...FIELDS, "view"]) state[key] = params.get(key) ?? (key === "view" ? "reading" : "");
  if (!(state.view in PER_PAGE)) state.view = "reading";
  state.page = Math.max(0, (parseInt(params.get("page"), 10) || 1) - 1);
  for (const key of FIELDS) $(key).value = state[key];
}

function save() {
  const kept = new URLSearchParams();
  for (const key of FIELDS) if (state[key]) kept.set(key, state[key]);
  if (state.view !== "reading") kept.set("view", state.view);
  if (state.page) kept.set("page", state.page + 1);
  history.replaceState(null, "", "#" + kept);
}

// ---- filters ----

function passes([path, domain, label, rules]) {
  if (state.domain && index.domains[domain] !== state.domain) return false;
  if (state.label && index.classes[label] !== state.label) return false;
  if (state.rule && !rules.some((rule) => rule >= 0 && index.rules[rule] === state.rule)) return false;
  const accepted = rules.includes(-1);
  const rejected = rules.some((rule) => rule >= 0);
  if (state.verdict === "accepted") return accepted;
  if (state.verdict === "rejected") return rejected;
  if (state.verdict === "exhausted") return rejected && !accepted;
  if (state.verdict === "none") return !rules.length;
  if (state.verdict === "all") return true;
  return rules.length > 0 || !anyAsked;
}

async function select() {
  const mine = ++run;
  const found = [];
  index.images.forEach((image, number) => { if (passes(image)) found.push(number); });
  const query = state.search.trim().toLowerCase();
  if (!query) {
    shown = found;
    return render(mine);
  }
  const chunks = new Map();
  for (const number of found) {
    const chunk = Math.floor(number / index.chunk);
    if (!chunks.has(chunk)) chunks.set(chunk, []);
    chunks.get(chunk).push(number);
  }
  const hits = [];
  let done = 0;
  for (const [chunk, numbers] of chunks) {
    const candidates = await candidatesOf(chunk);
    if (mine !== run) return;
    for (const number of numbers) {
      const own = candidates[number % index.chunk];
      const text = [index.images[number][0], ...own.flatMap((item) => [item.chain, item.reason ?? ""])].join("\n");
      if (text.toLowerCase().includes(query)) hits.push(number);
    }
    $("where").textContent = `searching … ${Math.round((100 * ++done) / chunks.size)}%`;
    if (done % 4 === 0) await new Promise((resume) => setTimeout(resume));
    if (mine !== run) return;
  }
  shown = hits;
  return render(mine);
}

// ---- page ----

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.append(...visible(text));
  return element;
}

// Text with invisible characters (controls, direction marks, zero widths) made visible and search matches highlighted.
const ODD = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g;

function* visible(text) {
  let from = 0;
  for (const found of text.matchAll(ODD)) {
    yield* marked(text.slice(from, found.index));
    const odd = document.createElement("span");
    odd.className = "odd";
    odd.textContent = "U+" + found[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    yield odd;
    from = found.index + 1;
  }
  yield* marked(text.slice(from));
}

function* marked(text) {
  const query = state.search.trim().toLowerCase();
  const lower = text.toLowerCase();
  if (!query || lower.length !== text.length) return yield text;
  let from = 0;
  for (let at = lower.indexOf(query); at >= 0; at = lower.indexOf(query, from)) {
    yield text.slice(from, at);
    const mark = document.createElement("mark");
    mark.textContent = text.slice(at, at + query.length);
    yield mark;
    from = at + query.length;
  }
  yield text.slice(from);
}

function stagesOf(chain) {
  const stages = [];
  let at = 0;
  for (const stage of STAGES) {
    const open = chain.indexOf(`<${stage}>`, at);
    const close = chain.indexOf(`</${stage}>`, open);
    if (open < 0 || close < 0 || chain.slice(at, open).trim()) return null;
    stages.push([stage, chain.slice(open + stage.length + 2, close).trim()]);
    at = close + stage.length + 3;
  }
  return chain.slice(at).trim() ? null : stages;
}

function candidate(item) {
  const box = make("div");
  const stages = stagesOf(item.chain);
  if (item.verdict === "rejected") {
    const line = make("p", "reason");
    line.append(make("span", "chip rejected", item.rule ?? "rejected"), " ", ...visible(item.reason ?? ""));
    box.append(line);
  }
  if (stages) {
    const list = make("dl");
    for (const [stage, text] of stages) list.append(make("dt", "", stage), make("dd", stage.toLowerCase(), text));
    box.append(list);
  } else box.append(make("p", "raw", item.chain || "(empty)"));
  const origin = Object.entries(item).filter(([key]) => !["chain", "verdict", "rule", "reason"].includes(key));
  if (origin.length) {
    const details = make("details");
    const values = origin.map(([key, value]) => `${key}: ${typeof value === "string" ? value : JSON.stringify(value)}`);
    details.append(make("summary", "", "Provenance"), make("pre", "", values.join("\n")));
    box.append(details);
  }
  return box;
}

function picture(number) {
  const image = make("img");
  const data = thumbnail(number);
  if (data && data !== "-") image.src = "data:image/webp;base64," + data;
  image.alt = data && data !== "-" ? "" : "unreadable image";
  return image;
}

// A thumbnail that opens at the largest size that the window has room for.
function zoomable(number) {
  const box = make("button", "zoom");
  box.type = "button";
  box.setAttribute("aria-label", `Enlarge ${index.images[number][0]}`);
  box.append(picture(number));
  box.addEventListener("click", () => {
    const caption = make("figcaption");
    caption.append(make("p", "of", nameOf(number)), make("p", "path", index.images[number][0]));
    $("large").querySelector("figure").replaceChildren(picture(number), caption);
    $("large").showModal();
  });
  return box;
}

function nameOf(number) {
  const [, domain, label] = index.images[number];
  return `${index.names[label]} · ${index.domains[domain]}`;
}

function verdictOf(rules) {
  if (rules.includes(-1)) return ["accepted", "accepted"];
  return rules.length ? ["rejected", `${rules.length} rejected`] : ["none", "no candidates"];
}

async function article(number) {
  const [path, , , rules] = index.images[number];
  const box = make("article");
  const left = make("div");
  left.append(zoomable(number), make("p", "of", nameOf(number)), make("p", "path", path));
  const right = make("div");
  const candidates = (await candidatesOf(Math.floor(number / index.chunk)))[number % index.chunk];
  if (!candidates.length) right.append(make("span", "chip none", "no candidates"));
  const tabs = make("div", "tabs");
  const bodies = candidates.map(candidate);
  const show = (which) => {
    bodies.forEach((body, i) => { body.hidden = i !== which; });
    [...tabs.children].forEach((tab, i) => tab.setAttribute("aria-pressed", i === which));
  };
  candidates.forEach((item, i) => {
    const tab = make("button", item.verdict === "rejected" ? "tab-bad" : "tab-good", `${i + 1} · ${item.verdict === "rejected" ? "rejected" : "accepted"}`);
    tab.type = "button";
    tab.addEventListener("click", () => show(i));
    tabs.append(tab);
  });
  if (candidates.length > 1) right.append(tabs);
  else if (candidates.length && rules[0] === -1) {
    const line = make("p", "reason");
    line.append(make("span", "chip accepted", "accepted"));
    right.append(line);
  }
  right.append(...bodies);
  const ruled = rules.findIndex((rule) => rule >= 0 && index.rules[rule] === state.rule);
  const rejected = rules.findIndex((rule) => rule >= 0);
  const first = state.rule ? ruled : state.verdict === "rejected" ? rejected : rules.indexOf(-1);
  if (candidates.length) show(Math.max(0, first));
  box.append(left, right);
  return box;
}

function tile(number) {
  const [path, , , rules] = index.images[number];
  const box = make("button", "tile");
  box.type = "button";
  box.title = path;
  const [, domain, label] = index.images[number];
  box.append(picture(number), make("p", "of", index.names[label]), make("p", "path", index.domains[domain]));
  box.append(make("span", "chip " + verdictOf(rules)[0], verdictOf(rules)[1]));
  box.addEventListener("click", () => {
    state.page = Math.floor(shown.indexOf(number) / PER_PAGE.reading);
    state.view = "reading";
    render(++run, number);
  });
  return box;
}

async function render(mine, target) {
  const per = PER_PAGE[state.view];
  const pages = Math.max(1, Math.ceil(shown.length / per));
  state.page = Math.min(state.page, pages - 1);
  const here = shown.slice(state.page * per, (state.page + 1) * per);
  const boxes = [];
  for (const number of here) boxes.push(state.view === "gallery" ? tile(number) : await article(number));
  if (mine !== run) return;
  const list = $("list");
  list.className = state.view;
  list.replaceChildren(...(boxes.length ? boxes : [make("p", "empty", "No images match these filters.")]));
  const first = state.page * per;
  $("where").textContent = shown.length
    ? `${(first + 1).toLocaleString("en")}–${(first + here.length).toLocaleString("en")} of ${shown.length.toLocaleString("en")}`
    : "0 images";
  for (const id of ["first", "previous"]) $(id).disabled = state.page === 0;
  for (const id of ["next", "last"]) $(id).disabled = state.page >= pages - 1;
  for (const view of ["reading", "gallery"]) $(view).setAttribute("aria-pressed", state.view === view);
  save();
  if (target === undefined) window.scrollTo(0, 0);
  else boxes[here.indexOf(target)].scrollIntoView({ block: "center" });
}

// ---- start ----

function fill(id, any, values, names) {
  $(id).append(new Option(any, ""), ...values.map((value, i) => new Option(names ? names[i] : value, value)));
}

function turn(to) {
  state.page = to;
  render(++run);
}

async function start() {
  index = await unpack("index");
  fill("domain", "all domains", index.domains);
  fill("label", "all classes", index.classes, index.names);
  fill("rule", "any rule", index.rules);
  const accepted = index.images.filter((image) => image[3].includes(-1)).length;
  const candidates = index.images.reduce((sum, image) => sum + image[3].length, 0);
  const asked = index.images.filter((image) => image[3].length).length;
  anyAsked = asked > 0;
  const format = (value) => value.toLocaleString("en");
  const hidden = index.images.length - asked;
  $("totals").textContent =
    `${format(index.images.length)} images, ${format(accepted)} with an accepted chain, ${format(candidates)} candidates` +
    (anyAsked && hidden ? `; ${format(hidden)} without candidates are hidden` : "");
  load();
  const expand = (open) => {
    $("filters").classList.toggle("open", open);
    $("more").setAttribute("aria-expanded", open);
  };
  expand(["domain", "label", "verdict", "rule"].some((key) => state[key]));
  $("more").addEventListener("click", () => expand(!$("filters").classList.contains("open")));
  $("large").addEventListener("click", (event) => { if (!event.target.closest("figcaption")) $("large").close(); });
  let waiting;
  for (const key of FIELDS) {
    $(key).addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => { state[key] = $(key).value; state.page = 0; select(); }, key === "search" ? 250 : 0);
    });
  }
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  for (const view of ["reading", "gallery"]) {
    $(view).addEventListener("click", () => {
      const first = state.page * PER_PAGE[state.view];
      state.view = view;
      turn(Math.floor(first / PER_PAGE[view]));
    });
  }
  $("first").addEventListener("click", () => turn(0));
  $("previous").addEventListener("click", () => turn(state.page - 1));
  $("next").addEventListener("click", () => turn(state.page + 1));
  $("last").addEventListener("click", () => turn(Math.ceil(shown.length / PER_PAGE[state.view]) - 1));
  document.addEventListener("keydown", (event) => {
    if ($("large").open || event.target.matches("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "ArrowRight" && !$("next").disabled) turn(state.page + 1);
    if (event.key === "ArrowLeft" && !$("previous").disabled) turn(state.page - 1);
    if (event.key === "/") { event.preventDefault(); $("search").focus(); }
  });
  window.addEventListener("hashchange", () => { load(); select(); });
  await select();
}

start();

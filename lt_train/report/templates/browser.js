"use strict";
// The theme button and the browser of samples. Everything from data goes into the page as text, never as markup.

const root = document.documentElement;
const THEMES = ["", "dark", "light"];

function stored(value) {
  try { // a browser may deny storage to a page from a file
    if (value === undefined) return localStorage.getItem("lt-train-theme") || "";
    localStorage.setItem("lt-train-theme", value);
  } catch { /* then the choice lasts as long as the page */ }
  return "";
}

function useTheme(theme) {
  if (theme) root.dataset.theme = theme; else delete root.dataset.theme;
  document.getElementById("theme").textContent = theme ? `Theme: ${theme}` : "Theme";
}

useTheme(stored());
document.getElementById("theme").addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(root.dataset.theme || "") + 1) % THEMES.length];
  useTheme(next);
  stored(next);
});

const parsed = new Map();
function embedded(id) { // parsed when first used: texts of thousands of traces are not needed to list them
  if (!parsed.has(id)) parsed.set(id, JSON.parse(document.getElementById(id).textContent));
  return parsed.get(id);
}

function make(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

const PAGE = 40;

function browseSamples(form) {
  const sets = embedded("index");
  const samples = sets.flatMap((set, number) => set.samples.map((row, at) => {
    const [problem, sample, correct, truncated, score, tokens, reasoning, extracted, extractedFrom, gradingError, characters] = row;
    return { set, number, at, problem, sample, correct, truncated, score, tokens, reasoning, extracted, extractedFrom, gradingError, characters };
  }));
  const counterparts = new Map(); // the same problem and sample by every model of its run
  const keyOf = (s) => JSON.stringify([s.set.run, s.set.evaluation, s.problem, s.sample]);
  for (const sample of samples) {
    const key = keyOf(sample);
    if (!counterparts.has(key)) counterparts.set(key, []);
    counterparts.get(key).push(sample);
  }
  const baseOf = (s) => counterparts.get(keyOf(s)).find((other) => other.set.base);
  const texts = (s) => embedded(`texts-${s.number}`)[s.at];
  const problemOf = (s) => embedded(`problems-${s.set.problems}`)[s.problem];

  const VERDICTS = {
    "": () => true,
    correct: (s) => s.correct,
    incorrect: (s) => !s.correct,
    truncated: (s) => s.truncated,
    lost: (s) => !s.correct && !s.set.base && baseOf(s)?.correct,
    won: (s) => s.correct && !s.set.base && baseOf(s) && !baseOf(s).correct,
  };
  const ORDERS = { longest: (a, b) => b.tokens - a.tokens, shortest: (a, b) => a.tokens - b.tokens };

  const rows = document.getElementById("rows");
  let matching = [];
  let shown = 0;
  let filter = {};

  function holds(s, words) {
    const problem = problemOf(s);
    return [s.problem, s.extracted, ...(problem ? [problem[0], ...problem[1]] : []), ...texts(s)]
      .some((text) => text !== null && text.toLowerCase().includes(words));
  }

  function apply() {
    filter = Object.fromEntries(new FormData(form));
    const words = filter.text.toLowerCase();
    matching = samples.filter((s) => (!filter.evaluation || s.set.evaluation === filter.evaluation)
      && (!filter.run || s.set.run === filter.run) && (!filter.variant || s.set.variant === filter.variant)
      && VERDICTS[filter.verdict](s) && (!words || holds(s, words)));
    if (filter.order) matching.sort(ORDERS[filter.order]);
    document.getElementById("count").textContent =
      `${matching.length.toLocaleString("en")} of ${samples.length.toLocaleString("en")} samples`;
    rows.replaceChildren();
    shown = 0;
    showMore();
    const query = new URLSearchParams(Object.entries(filter).filter(([, value]) => value)).toString();
    if (query || location.hash.startsWith("#samples?")) history.replaceState(null, "", query ? `#samples?${query}` : "#samples");
  }

  function showMore() {
    rows.append(...matching.slice(shown, shown + PAGE).map(row));
    shown = Math.min(shown + PAGE, matching.length);
  }

  function outcome(s) {
    const graded = s.score > 0 && s.score < 1 ? ` ${(100 * s.score).toFixed(0)} %` : "";
    if (s.correct) return ["c-trained", `✓ correct${graded}`];
    return s.truncated ? ["c-base", `✂ truncated${graded}`] : ["c-incorrect", `✗ incorrect${graded}`];
  }

  function model(s) {
    return make("span", { className: `model c-${s.set.colour}` }, make("i", { className: "dot" }), s.set.variant);
  }

  function row(s) {
    const [css, words] = outcome(s);
    const where = [...new Set(sets.map((set) => set.run))].length > 1 ? `${s.set.run} · ${s.set.evaluation}` : s.set.evaluation;
    const name = s.set.samples.some((other) => other[1] > 0) ? `${s.problem} · answer ${s.sample + 1}` : s.problem;
    const details = make("details", { className: "sample card" }, make("summary", {},
      make("span", { className: `verdict ${css}` }, words),
      make("span", { title: `${where}: ${name}` }, name, make("span", { className: "quiet" }, ` ${where}`)),
      model(s),
      make("span", { className: "quiet", title: "the answer found in the text" }, s.extracted === null ? "no answer found" : `→ ${s.extracted}`),
      make("span", { className: "tokens" }, `${s.tokens.toLocaleString("en")} tokens`)));
    details.addEventListener("toggle", () => {
      if (details.open && !details.querySelector(".body")) details.append(body(s));
    });
    return details;
  }

  function body(s) {
    const box = make("div", { className: "body" });
    fill(box, s);
    return box;
  }

  function fill(box, s) {
    const problem = problemOf(s);
    const [reasoning, answer] = texts(s);
    const others = counterparts.get(keyOf(s));
    box.replaceChildren();
    if (others.length > 1) {
      box.append(make("h4", {}, "The same problem by"), make("div", { className: "chips" }, ...others.map((other) => {
        const [css, words] = outcome(other);
        const chip = make("button", { type: "button" }, model(other), make("span", { className: `verdict ${css}` }, `\u00a0${words}`));
        chip.setAttribute("aria-pressed", String(other === s));
        chip.addEventListener("click", () => { fill(box, other); box.querySelector("[aria-pressed=true]").focus(); });
        return chip;
      })));
    }
    box.append(make("h4", {}, "Problem"), problem ? text(problem[0]) : make("p", { className: "note" }, `${s.problem}: its text cannot be shown (see above)`));
    const [css, words] = outcome(s);
    const found = s.extracted === null ? "none found" : s.extracted;
    box.append(make("div", { className: "answers" },
      fact(s.extractedFrom ? `Extracted answer (${s.extractedFrom})` : "Extracted answer", found),
      fact("True answer", problem ? problem[1].join("  or  ") : "not known here"),
      fact("Verdict", make("span", { className: `verdict ${css}` }, words), s.gradingError ? `: could not be graded (${s.gradingError})` : s.correct && s.truncated ? ", truncated" : ""),
      fact("Length", `${s.tokens.toLocaleString("en")} tokens${s.reasoning === null ? "" : `, ${s.reasoning.toLocaleString("en")} of them reasoning`}, ${s.characters.toLocaleString("en")} characters`)));
    if (reasoning) box.append(folded(`Reasoning, ${reasoning.length.toLocaleString("en")} characters`, reasoning));
    box.append(make("h4", {}, reasoning ? "After the reasoning" : "Answer"), answer ? text(answer) : make("p", { className: "note" }, "Nothing."));
  }

  function fact(name, ...value) {
    return make("div", {}, make("h4", {}, name), make("p", {}, ...value));
  }

  function folded(name, content) {
    const details = make("details", {}, make("summary", {}, make("h4", { style: "display:inline" }, name)));
    details.addEventListener("toggle", () => { if (details.open && !details.querySelector("pre")) details.append(text(content)); });
    if (filter.text && content.toLowerCase().includes(filter.text.toLowerCase())) details.open = true;
    return details;
  }

  function text(content) { // every hit of the search is marked, up to a number at which the page stays quick
    const box = make("pre", {});
    const words = (filter.text || "").toLowerCase();
    const low = content.toLowerCase();
    if (!words || low.length !== content.length) { box.textContent = content; return box; }
    let from = 0;
    for (let hits = 0, at = low.indexOf(words); at >= 0 && hits < 500; hits += 1, at = low.indexOf(words, from)) {
      box.append(content.slice(from, at), make("mark", {}, content.slice(at, at + words.length)));
      from = at + words.length;
    }
    box.append(content.slice(from));
    return box;
  }

  let waiting = 0;
  form.addEventListener("input", (event) => {
    clearTimeout(waiting);
    waiting = setTimeout(apply, event.target.name === "text" ? 150 : 0); // words are typed letter by letter
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  new IntersectionObserver((entries) => {
    if (entries.some((entry) => entry.isIntersecting) && shown < matching.length) showMore();
  }, { rootMargin: "1200px" }).observe(document.getElementById("more"));

  if (location.hash.startsWith("#samples?")) {
    for (const [name, value] of new URLSearchParams(location.hash.slice("#samples?".length))) {
      if (form.elements[name]) form.elements[name].value = value;
    }
    document.getElementById("samples").scrollIntoView();
  }
  apply();
}

const filters = document.getElementById("filters");
if (filters) browseSamples(filters);

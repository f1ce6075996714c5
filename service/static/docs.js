// Shows openapi.json: what each operation takes and gives, in words, with a form to try it.

import { key } from "./api.js";
import { element, save } from "./words.js";

const $ = (id) => document.getElementById(id);
const LONGEST = 20_000; // characters of an answer that are shown
const TEXTS = /json|^text\//;
let components = {};

/** A text with its `code` set as such. */
function prose(text) {
  const parts = text.split(/(`+[^`]+`+)/);
  return parts.map((part) => (part.startsWith("`") ? element("code", { textContent: part.replaceAll("`", "") }) : part));
}

const named = (schema = {}) => (schema.$ref ? components[schema.$ref.split("/").pop()] : schema);
const either = (schema) => schema.anyOf ?? schema.oneOf ?? [];

/** A schema's sort in a few words. */
function sort(given) {
  const schema = named(given);
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (either(schema).length) return [...new Set(either(schema).map(sort))].join(" | ");
  if (schema.prefixItems) return `[${schema.prefixItems.map(sort).join(", ")}]`;
  if (schema.type === "array") return `list of ${schema.items ? sort(schema.items) : "anything"}`;
  if (schema.format === "binary") return "file";
  return [schema.type ?? "anything"].flat().join(" | ");
}

const LIMITS = [
  ["minimum", "at least"], ["maximum", "at most"], ["minItems", "items, at least"], ["maxItems", "items, at most"],
  ["maxLength", "characters, at most"], ["pattern", "as"],
];

function limits(schema) {
  const said = LIMITS.filter(([name]) => name in schema && !schema.prefixItems).map(([name, words]) => `${words} ${schema[name]}`);
  if (schema.default != null) said.push(`default ${JSON.stringify(schema.default)}`);
  if (schema.examples) said.push(`such as ${schema.examples.map(String).join(", ")}`);
  return said.map((words) => `; ${words}`).join("");
}

/** The objects with fields of their own that a schema has anywhere within. */
function objects(given) {
  const schema = named(given);
  if (schema.properties) return [schema];
  return [...either(schema), schema.items, schema.contentSchema].filter(Boolean).flatMap(objects);
}

function fields(schema) {
  const rows = Object.entries(schema.properties).map(([name, given]) => field(name, given, schema.required?.includes(name)));
  return element("dl", { className: "schema" }, ...rows);
}

function field(name, given, must) {
  const schema = { ...named(given), ...given };
  const told = element("dd", {}, element("p", { className: "sort", textContent: sort(given) + limits(schema) }));
  if (schema.description) told.append(element("p", {}, ...prose(schema.description)));
  for (const inner of objects(given)) told.append(later(inner.title ?? "its fields", () => fields(inner)));
  return element("div", {}, element("dt", { className: must ? "must" : "" }, element("code", { textContent: name })), told);
}

/** What is made when it is first opened. */
function later(title, make, className = "nested") {
  const made = element("details", { className }, element("summary", { textContent: title }));
  made.addEventListener("toggle", () => made.open && made.childElementCount === 1 && made.append(make()));
  return made;
}

function contents(content) {
  return Object.entries(content ?? {}).flatMap(([kind, { schema }]) => {
    const inner = objects(schema);
    const told = [inner.length ? "" : sort(schema), named(schema).description].filter(Boolean).join("; ");
    const note = told ? [element("p", { className: "note" }, ...prose(told))] : [];
    return [element("h4", { textContent: kind }), ...note, ...inner.map(fields)];
  });
}

function answers(responses) {
  return Object.entries(responses).map(([status, { description, content }]) =>
    later(`${status} ${description}`, () => element("div", {}, ...contents(content))),
  );
}

function operation(path, method, told) {
  const id = `${method}${path}`.replaceAll(/[^a-z0-9]+/gi, "-");
  const [first, ...rest] = (told.description ?? told.summary).split("\n\n");
  const inside = () => {
    const made = element("div", { className: "inside" }, ...rest.map((text) => element("p", {}, ...prose(text))));
    if (told.parameters?.length) {
      const rows = told.parameters.map(({ name, in: place, required, schema, description }) =>
        field(name, { ...schema, description: [`in the ${place}`, description].filter(Boolean).join("; ") }, required));
      made.append(element("h3", { textContent: "Parameters" }), element("dl", { className: "schema" }, ...rows));
    }
    if (told.requestBody) made.append(element("h3", { textContent: "Body" }), ...contents(told.requestBody.content));
    made.append(element("h3", { textContent: "Answers" }), ...answers(told.responses));
    made.append(later("Try it", () => trial(path, method, told), "try"));
    return made;
  };
  const made = later("", inside, "operation card");
  made.id = id;
  made.firstElementChild.append(
    element("span", { className: "method", textContent: method.toUpperCase() }),
    element("span", { className: "path", textContent: path }),
    element("span", { className: "note" }, ...prose(first)),
  );
  return made;
}

/** An input with its label; `name` may stand for several, so the input lies within. */
function labelled(name, input) {
  return element("label", { className: "choice" }, element("code", { textContent: `${name} ` }), input);
}

function inputOf({ format } = {}) {
  return element("input", { type: format === "binary" ? "file" : "text", autocomplete: "off", spellcheck: false });
}

function trial(path, method, told) {
  const parameters = (told.parameters ?? []).map((each) => ({ ...each, input: inputOf() }));
  const content = told.requestBody?.content ?? {};
  const kinds = choice(content);
  const accept = choice(told.responses[200]?.content);
  const body = element("div", { className: "fields" });
  const answer = element("div", { role: "status" });
  let parts = {};
  const choose = () => {
    const schema = content[kinds.value]?.schema;
    const text = kinds.value === "application/json";
    parts = {};
    for (const [name, each] of text || !schema ? [] : Object.entries(schema.properties)) parts[name] = inputOf(each);
    if (text) parts.body = element("textarea", { rows: 8, spellcheck: false, value: JSON.stringify(sample(schema), null, 2) });
    body.replaceChildren(...Object.entries(parts).map(([name, input]) => labelled(name, input)));
  };
  kinds.addEventListener("change", choose);
  choose();
  const form = element("form", {}, ...parameters.map(({ name, input }) => labelled(name, input)));
  if (kinds.options.length) form.append(labelled("Content-Type", kinds), body);
  if (accept.options.length > 1) form.append(labelled("Accept", accept));
  form.append(element("div", {}, element("button", { className: "primary", textContent: "Send" })), answer);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    answer.replaceChildren("…");
    try {
      answer.replaceChildren(...(await shown(await send(path, method, parameters, kinds.value, parts, accept.value))));
    } catch {
      answer.replaceChildren("The service does not answer.");
    }
  });
  return form;
}

function choice(content = {}) {
  return element("select", {}, ...Object.keys(content).map((kind) => element("option", { textContent: kind })));
}

/** A body to begin with: what must be there. */
function sample(schema) {
  return Object.fromEntries((schema.required ?? []).map((name) => [name, named(schema.properties[name]).type === "array" ? [] : ""]));
}

function send(path, method, parameters, kind, parts, accept) {
  const query = new URLSearchParams();
  const headers = { Accept: accept || "*/*", ...(key.get() && { Authorization: `Bearer ${key.get()}` }) };
  let at = path.slice(1);
  for (const { name, in: place, input } of parameters) {
    if (place === "path") at = at.replace(`{${name}}`, encodeURIComponent(input.value));
    else if (place === "query" && input.value) query.set(name, input.value);
    else if (place === "header" && input.value) headers[name] = input.value;
  }
  const given = Object.entries(parts).map(([name, input]) => [name, input.files ? input.files[0] : input.value]).filter(([, value]) => value);
  let body;
  if (kind === "application/json") {
    body = parts.body.value;
    headers["Content-Type"] = kind;
  } else if (kind) {
    body = kind === "multipart/form-data" ? new FormData() : new URLSearchParams();
    for (const [name, value] of given) body.append(name, value);
  }
  return fetch(query.size ? `${at}?${query}` : at, { method: method.toUpperCase(), headers, body });
}

async function shown(response) {
  const kind = response.headers.get("content-type") ?? "";
  const line = element("p", {}, element("strong", { textContent: response.status }), ` ${kind}`);
  const blob = await response.blob();
  if (!blob.size) return [line];
  if (!TEXTS.test(kind)) {
    const button = element("button", { type: "button", textContent: `Save ${blob.size} bytes` });
    button.addEventListener("click", () => save(blob, kind === "image/png" ? "mask.png" : "answer"));
    return [line, button];
  }
  let text = await blob.text();
  if (kind.includes("json")) text = JSON.stringify(JSON.parse(text), null, 2);
  if (text.length > LONGEST) text = `${text.slice(0, LONGEST)}…`;
  return [line, element("pre", { textContent: text, tabIndex: 0 })];
}

function show({ info, paths, components: { schemas } }) {
  components = schemas;
  $("about").prepend(`${info.description} Version ${info.version}. `);
  const groups = new Map();
  for (const [path, operations] of Object.entries(paths))
    for (const [method, told] of Object.entries(operations)) {
      const [tag] = told.tags;
      if (!groups.has(tag)) groups.set(tag, []);
      groups.get(tag).push(operation(path, method, told));
    }
  for (const [tag, made] of groups) {
    const id = `tag-${tag.replaceAll(" ", "-")}`;
    $("operations").append(element("section", { id }, element("h2", { textContent: tag }), ...made));
    $("tags").append(element("a", { href: `#${id}`, textContent: tag }));
  }
  const wanted = location.hash && $(location.hash.slice(1));
  if (wanted) {
    if (wanted.matches("details")) wanted.open = true;
    wanted.scrollIntoView();
  }
}

$("key").value = key.get();
$("key").addEventListener("change", () => key.set($("key").value.trim()));
try {
  const response = await fetch("openapi.json");
  if (!response.ok) throw new Error();
  show(await response.json());
} catch {
  $("problem").textContent = "The description could not be read. Is the service still running?";
  $("problem").hidden = false;
}

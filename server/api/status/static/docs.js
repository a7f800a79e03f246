// Every route and every shape of openapi.json, which this daemon made itself. Nothing is loaded from elsewhere.

const METHODS = ["get", "post", "put", "patch", "delete"];
const at = (id) => document.getElementById(id);

function element(tag, classes, ...parts) {
  const node = document.createElement(tag);
  if (classes) node.className = classes;
  node.append(...parts.filter((part) => part !== undefined && part !== ""));
  return node;
}

const shapeOf = (ref) => ref.slice(ref.lastIndexOf("/") + 1);

function link(ref) {
  const name = shapeOf(ref), node = element("a", "", name);
  node.href = `#shape-${name}`;
  return node;
}

// A schema as people write types: `string | null`, `list of ChatMessage`.
function type(schema) {
  if (!schema || schema === true) return ["anything"];
  if (schema.$ref) return [link(schema.$ref)];
  const choices = schema.anyOf || schema.oneOf || schema.allOf;
  if (choices) return choices.flatMap((one, i) => [...(i ? [" | "] : []), ...type(one)]);
  if (schema.enum) return [schema.enum.map((one) => JSON.stringify(one)).join(" | ")];
  if ("const" in schema) return [JSON.stringify(schema.const)];
  if (schema.type === "array") return ["list of ", ...type(schema.items)];
  if (schema.type === "object" && typeof schema.additionalProperties === "object") return ["map of ", ...type(schema.additionalProperties)];
  return [[].concat(schema.type || "anything").join(" | ")];
}

const BOUNDS = { minimum: "≥", exclusiveMinimum: ">", maximum: "≤", exclusiveMaximum: "<", minLength: "length ≥", maxLength: "length ≤", minItems: "items ≥", maxItems: "items ≤" };

function remarks(schema) {
  const parts = [schema.description || ""];
  const inner = [schema, ...(schema.anyOf || [])];
  for (const [name, sign] of Object.entries(BOUNDS)) {
    const found = inner.find((one) => name in one);
    if (found) parts.push(`${sign} ${found[name]}`);
  }
  if (schema.default !== undefined && schema.default !== null) parts.push(`default ${JSON.stringify(schema.default)}`);
  return parts.filter(Boolean).join("; ");
}

function fields(rows) {
  return element("table", "fields", element("tbody", "", ...rows.map(([name, needed, kind, says]) => {
    const first = element("td", "", element("code", "", name), needed ? element("span", "needed", " required") : "");
    return element("tr", "", first, element("td", "type", ...kind), element("td", "", says));
  })));
}

const properties = (shape) => fields(Object.entries(shape.properties || {}).map(([name, schema]) => [
  name, (shape.required || []).includes(name), type(schema), remarks(schema),
]));

function route(path, method, operation) {
  const node = element("details", "");
  const text = operation.description || "";
  const [says] = text.split("\n");
  node.append(element("summary", "", element("span", "method", method.toUpperCase()), element("code", "", path), element("span", "says", says)));
  if (text !== says) node.append(element("p", "text", text));
  if (operation.parameters?.length) {
    node.append(element("h3", "", "Parameters"), fields(operation.parameters.map((one) => [one.name, one.required, type(one.schema), [`in ${one.in}`, remarks(one.schema)].filter(Boolean).join("; ")])));
  }
  for (const [media, body] of Object.entries(operation.requestBody?.content || {})) {
    node.append(element("h3", "", `Body, ${media}`), element("p", "type", ...type(body.schema)));
  }
  node.append(element("h3", "", "Answers"), fields(Object.entries(operation.responses || {}).map(([code, answer]) => {
    const [media, content] = Object.entries(answer.content || {})[0] || ["", null];
    return [code, false, content ? type(content.schema) : ["–"], media];
  })));
  node.dataset.find = `${method} ${path} ${text}`.toLowerCase();
  return node;
}

function shape(name, schema) {
  const node = element("details", "", element("summary", "", element("code", "", name)));
  node.id = `shape-${name}`;
  if (schema.description) node.append(element("p", "text", schema.description));
  node.append(schema.properties ? properties(schema) : element("p", "type", ...type(schema)));
  node.dataset.find = `${name} ${Object.keys(schema.properties || {}).join(" ")}`.toLowerCase();
  return node;
}

function reveal() {
  const node = location.hash && document.getElementById(location.hash.slice(1));
  if (node) { node.open = true; node.scrollIntoView(); }
}

async function load() {
  try {
    const answer = await fetch("openapi.json");
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    const api = await answer.json();
    at("version").textContent = api.info.version;
    for (const [path, item] of Object.entries(api.paths)) {
      for (const method of METHODS) if (item[method]) at("routes").append(route(path, method, item[method]));
    }
    for (const [name, schema] of Object.entries(api.components.schemas).sort()) at("shapes").append(shape(name, schema));
    at("note").hidden = true;
    reveal();
  } catch (error) {
    at("note").textContent = `The document did not come: ${error.message}. Reload to try again.`;
  }
}

at("find").addEventListener("input", () => {
  const wanted = at("find").value.trim().toLowerCase();
  for (const node of document.querySelectorAll("details")) node.hidden = !node.dataset.find.includes(wanted);
});
addEventListener("hashchange", reveal);
load();

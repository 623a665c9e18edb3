// Draw /openapi.json. Everything is put in as text, so nothing in it can become markup.

const place = document.getElementById("routes");

function element(tag, text = "", className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function resolve(schema, root) {
  if (!schema || !schema.$ref) return schema || {};
  return schema.$ref.slice(2).split("/").reduce((node, key) => node?.[key], root) || {};
}

function typeOf(schema, root) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map((one) => typeOf(one, root)).join(" or ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(", ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.type === "array") return `list of ${typeOf(schema.items || {}, root)}`;
  const low = schema.minimum ?? schema.exclusiveMinimum;
  const high = schema.maximum ?? schema.exclusiveMaximum;
  const range = low === undefined && high === undefined ? "" : ` (${low ?? ""} to ${high ?? ""})`;
  return `${schema.type || "any"}${range}`;
}

function keyTable(schema, root) {
  const table = element("table");
  const head = table.createTHead().insertRow();
  for (const title of ["key", "type", "default", ""]) head.append(element("th", title));
  const body = table.createTBody();
  for (const [name, entry] of Object.entries(schema.properties || {})) {
    const row = body.insertRow();
    row.insertCell().append(element("code", name));
    row.insertCell().textContent = typeOf(entry, root);
    const required = (schema.required || []).includes(name);
    row.insertCell().textContent = entry.default === undefined ? (required ? "required" : "") : JSON.stringify(entry.default);
    row.insertCell().textContent = entry.description || "";
  }
  return table;
}

function drawBody(content, root) {
  const parts = [];
  for (const [kind, { schema }] of Object.entries(content || {})) {
    const resolved = resolve(schema, root);
    parts.push(element("p", kind, "quiet"));
    if (resolved.properties) parts.push(keyTable(resolved, root));
  }
  return parts;
}

function drawRoute(path, method, route, root) {
  const details = element("details");
  const summary = element("summary");
  summary.append(element("span", method.toUpperCase(), "method"), element("code", path), ` ${route.summary || ""}`);
  details.append(summary, element("p", route.description || ""));
  if (route.parameters?.length) {
    const properties = {};
    for (const { name, schema, description, required } of route.parameters) {
      properties[name] = { ...schema, description: description || schema?.description, required };
    }
    details.append(element("h4", "Parameters"));
    details.append(keyTable({ properties, required: route.parameters.filter((p) => p.required).map((p) => p.name) }, root));
  }
  if (route.requestBody) details.append(element("h4", "Body"), ...drawBody(route.requestBody.content, root));
  details.append(element("h4", "Answers"));
  for (const [code, answer] of Object.entries(route.responses || {})) {
    details.append(element("p", `${code}: ${answer.description || ""}`));
    if (code < "300") details.append(...drawBody(answer.content, root));
  }
  return details;
}

function drawSchemas(root) {
  const parts = [element("h2", "Bodies and answers")];
  for (const [name, schema] of Object.entries(root.components?.schemas || {})) {
    const details = element("details");
    details.append(element("summary", name), element("p", schema.description || ""), keyTable(schema, root));
    parts.push(details);
  }
  return parts;
}

async function draw() {
  const answer = await fetch("/openapi.json");
  if (!answer.ok) throw new Error(`openapi.json: ${answer.status}`);
  const root = await answer.json();
  const parts = [element("h1", `${root.info.title} ${root.info.version}`), element("p", root.info.description || "")];
  for (const [path, methods] of Object.entries(root.paths)) {
    for (const [method, route] of Object.entries(methods)) parts.push(drawRoute(path, method, route, root));
  }
  place.replaceChildren(...parts, ...drawSchemas(root));
}

draw().catch((error) => place.replaceChildren(element("p", String(error.message))));

// Reads Mermaid diagrams as the real Mermaid does: a JSON string a line in, its nodes and edges or the error as JSON out.
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { createInterface } from 'node:readline';
import { runInThisContext } from 'node:vm';
import { parseHTML } from 'linkedom';

// Mermaid cleans labels with DOMPurify, which wants a browser's document. This build of it is a script of a page, no module.
globalThis.window = parseHTML('<html><body></body></html>').window;
globalThis.document = window.document;
runInThisContext(readFileSync(createRequire(import.meta.url).resolve('@mermaid-js/tiny'), 'utf8'));
const { mermaid } = globalThis;

// What Mermaid makes of #95; until it draws.
const decode = (text) => text.replace(/ﬂ°°(\d+)¶ß/g, (_, code) => String.fromCodePoint(code));

const read = async (text) => {
  await mermaid.parse(text);
  const { db, type } = await mermaid.mermaidAPI.getDiagramFromText(text);
  return {
    type,
    nodes: [...db.getVertices().values()].map(({ id, text, type, classes }) => [id, decode(text), type, classes]),
    edges: db.getEdges().map(({ start, end }) => [start, end]),
    classes: [...db.getClasses().keys()],
  };
};

for await (const line of createInterface({ input: process.stdin })) {
  const answer = await read(JSON.parse(line)).catch((error) => ({ error: String(error) }));
  process.stdout.write(JSON.stringify(answer) + '\n');
}

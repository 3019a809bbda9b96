// Compiles a flow as pgflow does: TypeScript with a flow as its default export in, a JSON array of SQL statements out.
import { readFileSync, writeFileSync } from 'node:fs';
import { compileFlow } from '@pgflow/dsl';
import ts from 'typescript';

const { outputText } = ts.transpileModule(readFileSync(0, 'utf8'), {
  compilerOptions: { module: ts.ModuleKind.ESNext, target: ts.ScriptTarget.ES2022 },
});
// A file beside this one, because imports are looked for from there.
const compiled = new URL('flow.js', import.meta.url);
writeFileSync(compiled, outputText);
const { default: flow } = await import(compiled);
console.log(JSON.stringify(compileFlow(flow)));

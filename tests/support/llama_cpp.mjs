// Runs prompts through llama.cpp, by node-llama-cpp: what test_llama_cpp.py compares with transformers.
//
// stdin: {"model": path, "lora": path or null, "length": n, "prompts": [{"text": …, "ids": […]}]}
// stdout: a line of JSON for each prompt: its tokens as llama.cpp cuts it, the n that follow `ids`
// greedily (fewer where one ends the text), and the likeliest first ones with their log probabilities.
import {readFileSync} from "node:fs";
import {pathToFileURL} from "node:url";
import {createRequire} from "node:module";

const here = createRequire(process.cwd() + "/package.json");
const {getLlama, LlamaLogLevel} = await import(
    pathToFileURL(here.resolve("node-llama-cpp")).href
);

const request = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({
    gpu: false, build: "never", skipDownload: true, progressLogs: false, logLevel: LlamaLogLevel.error
});
const model = await llama.loadModel({modelPath: request.model});
const context = await model.createContext({
    contextSize: 256, threads: 1,
    ...(request.lora ? {lora: {adapters: [{filePath: request.lora, scale: 1}]}} : {})
});
const sequence = context.getSequence();
const everyToken = {temperature: 1, topK: 0, topP: 1, minP: 0};

/** Returns the probabilities of what follows the tokens, which are added to the sequence. */
async function next(tokens) {
    const last = [tokens.at(-1), {generateNext: {probabilities: true, options: everyToken}}];
    const results = await sequence.controlledEvaluate([...tokens.slice(0, -1), last]);
    return results.at(-1).next.probabilities;
}

for (const {text, ids} of request.prompts) {
    await sequence.clearHistory();
    const generated = [];
    let probabilities = await next(ids);
    const top = [...probabilities].slice(0, 50).map(([id, p]) => [id, Math.log(p)]);
    while (generated.length < request.length) {
        const [token] = probabilities.keys();
        if (model.isEogToken(token)) break;
        generated.push(token);
        probabilities = await next([token]);
    }
    const tokenized = model.tokenize(text, true);
    console.log(JSON.stringify({tokenized, generated, top}));
}
await context.dispose();
process.exit(0);

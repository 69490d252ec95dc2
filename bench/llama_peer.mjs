// llama.cpp through node-llama-cpp: one JSON line {prompts, tokens} in, one JSON line {seconds, first} out. See llama_peer.py.
import {createInterface} from "node:readline";
import {getLlama, LlamaLogLevel} from "node-llama-cpp";

const [modelPath, threads, sequences] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", maxThreads: Number(threads), logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath, gpuLayers: 0});
const context = await model.createContext({
    contextSize: 1024, sequences: Number(sequences), threads: Number(threads), batchSize: 1024
});
const free = Array.from({length: Number(sequences)}, () => context.getSequence());

async function generate(sequence, prompt, tokens) {
    await sequence.clearHistory();
    let first = null, count = 0;
    for await (const _ of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        first ??= performance.now();
        if (++count === tokens)
            break;
    }
    return first;
}

process.stdout.write(JSON.stringify({ready: true}) + "\n");
for await (const line of createInterface({input: process.stdin})) {
    const {prompts, tokens} = JSON.parse(line);
    const started = performance.now();
    const firsts = await Promise.all(prompts.map((prompt, i) => generate(free[i], prompt, tokens)));
    const seconds = (performance.now() - started) / 1000;
    process.stdout.write(JSON.stringify({seconds, first: (Math.max(...firsts) - started) / 1000}) + "\n");
}
process.exit(0);

// llama.cpp through node-llama-cpp, spoken to as peer_process.py says. Arguments: GGUF file, threads, streams.
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
    let count = 0;
    for await (const _ of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true}))
        if (++count === tokens)
            break;
}

process.stdout.write(JSON.stringify({ready: true}) + "\n");
for await (const line of createInterface({input: process.stdin})) {
    const {prompts, tokens} = JSON.parse(line);
    const started = performance.now();
    await Promise.all(prompts.map((prompt, i) => generate(free[i], prompt, tokens)));
    process.stdout.write(JSON.stringify({seconds: (performance.now() - started) / 1000}) + "\n");
}
process.exit(0);

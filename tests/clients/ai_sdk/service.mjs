// The service as the AI SDK's providers see it. Every script here is called as
// `node SCRIPT URL PROVIDER` and prints one JSON document.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { tool } from "ai";
import { z } from "zod";

// Warnings go to the output, which is for the document.
globalThis.AI_SDK_LOG_WARNINGS = false;

const [, , url, provider] = process.argv;
const baseURL = `${url}/v1`;
const apiKey = "unused";
const compatible = createOpenAICompatible({
  name: "calm",
  baseURL,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const openai = createOpenAI({ baseURL, apiKey });
const anthropic = createAnthropic({ baseURL, apiKey });

const MODELS = {
  compatible: (id) => compatible(id),
  "openai-chat": (id) => openai.chat(id),
  "openai-responses": (id) => openai.responses(id),
  anthropic: (id) => anthropic(id),
};
const EMBEDDERS = {
  compatible: (id) => compatible.embeddingModel(id),
  openai: (id) => openai.embedding(id),
};

export const model = (id) => MODELS[provider](id);
export const embedder = (id) => EMBEDDERS[provider](id);
export const options = { maxOutputTokens: 60, maxRetries: 0 };

// The grammar is finite: so small a model does not end a text by itself.
export const City = z.object({ city: z.enum(["Berlin", "Paris", "Rome"]) });

export const tools = {
  get_weather: tool({
    description: "Weather of a city.",
    inputSchema: City,
    strict: true,
    execute: async ({ city }) => ({ city, sky: "sunny", celsius: 21 }),
  }),
};

export const print = (document) => console.log(JSON.stringify(document));

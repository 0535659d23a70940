// Vectors of several texts, and of one.
import { cosineSimilarity, embed, embedMany } from "ai";
import { embedder, print } from "./service.mjs";

const texts = ["A man is eating food.", "A man is eating a meal.", "The stock market fell today."];
const many = await embedMany({ model: embedder("minilm"), values: texts, maxRetries: 0 });
const one = await embed({ model: embedder("minilm"), value: texts[0], maxRetries: 0 });
print({
  dimensions: many.embeddings.map((vector) => vector.length),
  tokens: many.usage.tokens,
  near: cosineSimilarity(many.embeddings[0], many.embeddings[1]),
  far: cosineSimilarity(many.embeddings[0], many.embeddings[2]),
  same: cosineSimilarity(many.embeddings[0], one.embedding),
});

"""The merged model in the formats of other engines: GGUF for llama.cpp and Ollama, fewer bits for vLLM."""

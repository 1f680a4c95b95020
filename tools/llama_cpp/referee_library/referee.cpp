// The functions of llama.cpp that tools/llama_cpp/referee.py needs, as C functions for ctypes. They pass no structures,
// so an incompatible version of llama.cpp fails at compile time and not at run time.

#include "llama.h"

#include "jinja/lexer.h"
#include "jinja/parser.h"
#include "jinja/runtime.h"
#include "json.h"

#include <cstdint>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

struct referee {
    llama_model * model = nullptr;
    const llama_vocab * vocabulary = nullptr;
    llama_context * context = nullptr;
};

static void log_nothing(ggml_log_level, const char *, void *) {}

// Copies as much of a text as fits, and returns its whole length.
static int32_t give(const std::string & text, char * output, int32_t capacity) {
    const size_t room = static_cast<size_t>(capacity);
    std::memcpy(output, text.data(), text.size() < room ? text.size() : room);
    return static_cast<int32_t>(text.size());
}

extern "C" {

void referee_close(referee * self) {
    if (self->context) {
        llama_free(self->context);
    }
    if (self->model) {
        llama_model_free(self->model);
    }
    delete self;
}

// Opens a GGUF file; `positions` 0 opens only the vocabulary. `exact` keeps keys and values in F32 and attention unfused.
// Returns null if llama.cpp refuses the file.
referee * referee_open(const char * path, int32_t positions, int32_t threads, bool exact) {
    llama_log_set(log_nothing, nullptr);
    llama_backend_init();
    llama_model_params model_parameters = llama_model_default_params();
    model_parameters.vocab_only = positions == 0;
    referee * self = new referee;
    self->model = llama_model_load_from_file(path, model_parameters);
    if (self->model && positions > 0) {
        llama_context_params parameters = llama_context_default_params();
        parameters.n_ctx = parameters.n_batch = static_cast<uint32_t>(positions);
        parameters.n_threads = parameters.n_threads_batch = threads;
        if (exact) {
            parameters.type_k = parameters.type_v = GGML_TYPE_F32;
            parameters.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
        }
        self->context = llama_init_from_model(self->model, parameters);
    }
    if (!self->model || (positions > 0 && !self->context)) {
        referee_close(self);
        return nullptr;
    }
    self->vocabulary = llama_model_get_vocab(self->model);
    return self;
}

int32_t referee_vocabulary_size(const referee * self) {
    return llama_vocab_n_tokens(self->vocabulary);
}

bool referee_ends_text(const referee * self, int32_t token) {
    return llama_vocab_is_eog(self->vocabulary, token);
}

// Returns the number of tokens, or its negative if `capacity` is too small.
int32_t referee_tokenize(const referee * self, const char * text, int32_t length, bool add_special,
                         bool parse_special, int32_t * tokens, int32_t capacity) {
    return llama_tokenize(self->vocabulary, text, length, tokens, capacity, add_special, parse_special);
}

// Returns the length of the text without control tokens, or its negative if `capacity` is too small.
int32_t referee_detokenize(const referee * self, const int32_t * tokens, int32_t count, char * text,
                           int32_t capacity) {
    return llama_detokenize(self->vocabulary, tokens, count, text, capacity, false, false);
}

// Keeps the tokens before `position`, appends `count` tokens there, and writes the logits [count, vocabulary] of
// all of them. Returns what llama_decode returned, 0 for success.
int32_t referee_logits(referee * self, const int32_t * tokens, int32_t count, int32_t position, float * logits) {
    llama_memory_seq_rm(llama_get_memory(self->context), 0, position, -1);
    llama_batch batch = llama_batch_init(count, 0, 1);
    batch.n_tokens = count;
    for (int32_t i = 0; i < count; i++) {
        batch.token[i] = tokens[i];
        batch.pos[i] = position + i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = true;
    }
    const int32_t code = llama_decode(self->context, batch);
    llama_batch_free(batch);
    const size_t width = static_cast<size_t>(llama_vocab_n_tokens(self->vocabulary));
    for (int32_t i = 0; code == 0 && i < count; i++) {
        std::memcpy(logits + static_cast<size_t>(i) * width, llama_get_logits_ith(self->context, i),
                    width * sizeof(float));
    }
    return code;
}

// Renders a chat template with the variables of a JSON object. Writes a JSON list of [text, whether it came from the
// variables], or a JSON string with the error message, and returns the length of either.
int32_t referee_render(const char * chat_template, const char * variables, char * output, int32_t capacity) {
    try {
        jinja::lexer lexer;
        const auto tokens = lexer.tokenize(chat_template);
        const jinja::program program = jinja::parse_from_tokens(tokens);
        jinja::context context(tokens.source);
        jinja::global_from_json(context, common_json::parse(variables), true);
        jinja::runtime runtime(context);
        const auto parts = jinja::runtime::gather_string_parts(runtime.execute(program));
        common_json result = common_json::array();
        for (const auto & part : parts->val_str.parts) {
            common_json pair = common_json::array();
            pair.push_back(part.val);
            pair.push_back(part.is_input);
            result.push_back(pair);
        }
        return give(result.dump(), output, capacity);
    } catch (const std::exception & error) {
        return give(common_json(std::string(error.what())).dump(), output, capacity);
    }
}
}

/* endless_chat: the app facade in plain C. Says each message and prints the answers.
 *
 *     endless_chat MODEL [-c N_CTX] [-n MAX_TOKENS] [-s SEED] [--temp T] [--samplers NAME;...] [--dry-multiplier X]
 *                  [--xtc-probability P] [--mirostat 1|2] [--adaptive-target P] [-t THREADS] [-sys TEXT] [-tmpl NAME]
 *                  [--session FILE] MESSAGE...
 */
#include "edge_stream_app.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int fail(void) {
    fprintf(stderr, "endless_chat: %s\n", es_last_error());
    return 1;
}

static bool print_token(void * user, const es_app_token * token) {
    fwrite(token->bytes, 1, token->n_bytes, (FILE *) user);
    fflush((FILE *) user);
    return true;
}

int main(int argc, char ** argv) {
    es_app_session_params params  = es_app_session_default_params();
    es_app_answer_params  answer  = es_app_answer_default_params();
    const char *          session = NULL;
    es_app_model *        model   = NULL;
    es_app_session *      chat    = NULL;
    FILE *                file    = NULL;
    int                   i       = 2;
    int32_t               rc;

    for (; i + 1 < argc && argv[i][0] == '-'; i += 2) {
        const char *flag = argv[i], *value = argv[i + 1];
        if (strcmp(flag, "-c") == 0) {
            params.n_ctx = (uint32_t) atoi(value);
        } else if (strcmp(flag, "-n") == 0) {
            answer.max_tokens = atoll(value);
        } else if (strcmp(flag, "-s") == 0) {
            answer.sampling.seed = (uint32_t) strtoul(value, NULL, 10);
        } else if (strcmp(flag, "--temp") == 0) {
            answer.sampling.temp = (float) atof(value);
        } else if (strcmp(flag, "--samplers") == 0) {
            answer.sampling.samplers = value;
        } else if (strcmp(flag, "--dry-multiplier") == 0) {
            answer.sampling.dry_multiplier = (float) atof(value);
        } else if (strcmp(flag, "--xtc-probability") == 0) {
            answer.sampling.xtc_probability = (float) atof(value);
        } else if (strcmp(flag, "--mirostat") == 0) {
            answer.sampling.mirostat = atoi(value);
        } else if (strcmp(flag, "--adaptive-target") == 0) {
            answer.sampling.adaptive_target = (float) atof(value);
        } else if (strcmp(flag, "-t") == 0) {
            params.n_threads = (uint32_t) atoi(value);
        } else if (strcmp(flag, "-sys") == 0) {
            params.system = value;
        } else if (strcmp(flag, "-tmpl") == 0) {
            params.chat_template = value;
        } else if (strcmp(flag, "--session") == 0) {
            session = value;
        } else {
            fprintf(stderr, "endless_chat: unknown flag %s\n", flag);
            return 2;
        }
    }
    if (i >= argc) {
        fprintf(stderr, "usage: endless_chat MODEL [flags] MESSAGE...\n");
        return 2;
    }
    if (es_app_model_load(argv[1], es_app_model_default_params(), &model) != ES_OK) {
        return fail();
    }
    file = session ? fopen(session, "rb") : NULL;
    if (file) {
        fclose(file);
    }
    rc = file ? es_app_session_restore(model, params, session, &chat) : es_app_session_open(model, params, &chat);
    for (; rc == ES_OK && i < argc; ++i) {
        rc = es_app_say(chat, argv[i], answer, NULL, NULL);
        if (rc == ES_OK) {
            rc = es_app_generate(chat, print_token, stdout);
        }
        if (rc == ES_OK && session) {
            rc = es_app_session_save(chat, session);
        }
        putchar('\n');
    }
    if (rc != ES_OK) {
        fail();
    }
    es_app_session_free(chat);
    es_app_model_free(model);
    return rc != ES_OK;
}

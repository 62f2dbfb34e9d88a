/* A stand-in for libcusparseLt on a CPU: the functions that gemm24/cusparselt.py calls, with NVIDIA's signatures.
 *
 * It logs one line per call, refuses the function that a test names, and multiplies bfloat16 matrices. It reads the
 * sparse operand as a dense (m, k) matrix. Structs point at each other, as NVIDIA's may, so that a struct that was moved
 * or freed gives a wrong result.
 */
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef struct { uint64_t magic; } Handle;
typedef struct { int64_t rows, cols, ld; int type, order, sparse; } Matrix;
typedef struct { int op_a, op_b, compute; const Matrix *a, *b, *c, *d; } Matmul;
typedef struct { const Matmul *matmul; int alg_id, split_k; } Selection;
typedef struct { const Matmul *matmul; const Selection *selection; } Plan;

static const uint64_t MAGIC = 0x243f6a8885a308d3;
static char log_text[1 << 16], refused[64];
static int refused_status, major = 0, minor = 8;
static size_t workspace_bytes = 4096;

const char *stub_log(void) { return log_text; }
void stub_clear(void) { log_text[0] = refused[0] = 0; }
void stub_refuse(const char *function, int status) { strcpy(refused, function); refused_status = status; }
void stub_version(int a, int b) { major = a, minor = b; }
void stub_workspace(size_t bytes) { workspace_bytes = bytes; }

static int called(const char *function, const char *format, ...) {
    char line[512];
    int used = snprintf(line, sizeof line, "%s", function);
    va_list args;
    va_start(args, format);
    vsnprintf(line + used, sizeof line - used, format, args);
    va_end(args);
    strncat(log_text, line, sizeof log_text - strlen(log_text) - 2);
    strcat(log_text, "\n");
    return strcmp(function, refused) ? 0 : refused_status;
}

static int misaligned(const void *p) { return (uintptr_t)p % 16 != 0; }

static int bad(const Handle *handle) { return misaligned(handle) || handle->magic != MAGIC; }

const char *cusparseLtGetErrorName(int status) {
    return status == 3 ? "CUSPARSE_STATUS_INVALID_VALUE" : status == 10 ? "CUSPARSE_STATUS_NOT_SUPPORTED" : "unknown";
}

int cusparseLtGetProperty(int part, int *value) {
    *value = part == 0 ? major : minor;
    return 0;
}

int cusparseLtInit(Handle *handle) {
    handle->magic = MAGIC;
    return misaligned(handle) ? 3 : called("Init", "");
}

static int matrix(const char *name, const Handle *handle, Matrix *m, int64_t rows, int64_t cols, int64_t ld,
                  uint32_t alignment, int type, int order, int sparse) {
    *m = (Matrix){rows, cols, ld, type, order, sparse};
    if (bad(handle) || misaligned(m)) return 3;
    return called(name, " %ld %ld ld %ld align %u type %d order %d", rows, cols, ld, alignment, type, order);
}

int cusparseLtDenseDescriptorInit(const Handle *handle, Matrix *m, int64_t rows, int64_t cols, int64_t ld,
                                  uint32_t alignment, int type, int order) {
    return matrix("DenseDescriptorInit", handle, m, rows, cols, ld, alignment, type, order, 0);
}

int cusparseLtStructuredDescriptorInit(const Handle *handle, Matrix *m, int64_t rows, int64_t cols, int64_t ld,
                                       uint32_t alignment, int type, int order, int sparsity) {
    return sparsity ? 3 : matrix("StructuredDescriptorInit", handle, m, rows, cols, ld, alignment, type, order, 1);
}

int cusparseLtMatmulDescriptorInit(const Handle *handle, Matmul *matmul, int op_a, int op_b, const Matrix *a,
                                   const Matrix *b, const Matrix *c, const Matrix *d, int compute) {
    *matmul = (Matmul){op_a, op_b, compute, a, b, c, d};
    if (bad(handle) || misaligned(matmul) || !a->sparse || b->sparse || d->sparse || c->type != d->type) return 3;
    return called("MatmulDescriptorInit", " op %d %d compute %d", op_a, op_b, compute);
}

int cusparseLtMatmulAlgSelectionInit(const Handle *handle, Selection *selection, const Matmul *matmul, int alg) {
    *selection = (Selection){matmul, 0, 1};
    return bad(handle) || misaligned(selection) || alg ? 3 : called("MatmulAlgSelectionInit", "");
}

int cusparseLtMatmulAlgSetAttribute(const Handle *handle, Selection *selection, int attribute, const void *data,
                                    size_t size) {
    if (bad(handle) || size != sizeof(int) || (attribute != 0 && attribute != 3)) return 3;
    *(attribute == 0 ? &selection->alg_id : &selection->split_k) = *(const int *)data;
    return called("MatmulAlgSetAttribute", " %d = %d", attribute, *(const int *)data);
}

int cusparseLtMatmulPlanInit(const Handle *handle, Plan *plan, const Matmul *matmul, const Selection *selection) {
    *plan = (Plan){matmul, selection};
    if (bad(handle) || misaligned(plan)) return 3;
    return called("MatmulPlanInit", " alg %d split %d", selection->alg_id, selection->split_k);
}

int cusparseLtMatmulGetWorkspace(const Handle *handle, const Plan *plan, size_t *size) {
    *size = workspace_bytes;
    return bad(handle) || misaligned(plan) ? 3 : called("MatmulGetWorkspace", "");
}

static float number(const Matrix *m, const void *data, int64_t row, int64_t col) {
    int64_t i = m->order == 2 ? row * m->ld + col : col * m->ld + row;
    uint32_t bits = (uint32_t)((const uint16_t *)data)[i] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static void store(const Matrix *m, void *data, int64_t row, int64_t col, float value) {
    int64_t i = m->order == 2 ? row * m->ld + col : col * m->ld + row;
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    ((uint16_t *)data)[i] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

int cusparseLtMatmul(const Handle *handle, const Plan *plan, const float *alpha, const void *a, const void *b,
                     const float *beta, const void *c, void *d, void *workspace, void **streams, int32_t count) {
    const Matmul *mm = plan->matmul;
    if (bad(handle) || count != 1 || c != d || !workspace != !workspace_bytes) return 3;
    if (workspace) memset(workspace, 0xff, workspace_bytes);
    for (int64_t i = 0; i < mm->d->rows && mm->a->type == 14; i++)
        for (int64_t j = 0; j < mm->d->cols; j++) {
            float sum = 0;
            for (int64_t k = 0; k < mm->a->cols; k++)
                sum += number(mm->a, a, i, k) * (mm->op_b ? number(mm->b, b, j, k) : number(mm->b, b, k, j));
            store(mm->d, d, i, j, *alpha * sum + (*beta ? *beta * number(mm->d, c, i, j) : 0));
        }
    return called("Matmul", " alg %d stream %p", plan->selection->alg_id, streams[0]);
}

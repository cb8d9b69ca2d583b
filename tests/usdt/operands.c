/*
 * Fires probes whose arguments are in all the places in which a compiler may put them, once for each
 * line that it reads, and writes what it gave them. tests/it/usdt.rs builds it by several compilers.
 *
 * Of `qemu`'s probes it has some, with semaphores and arguments as QEMU's dtrace backend makes them.
 */
#define _SDT_HAS_SEMAPHORES 1
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/sdt.h>

#define SEMAPHORE(name) \
    __extension__ unsigned short name##_semaphore __attribute__((section(".probes"), used))

SEMAPHORE(operands_sizes);
SEMAPHORE(operands_constants);
SEMAPHORE(operands_globals);
SEMAPHORE(operands_indexed);
SEMAPHORE(operands_structured);
SEMAPHORE(operands_many);
SEMAPHORE(operands_none);
SEMAPHORE(qemu_vmstate_downtime_save);
SEMAPHORE(qemu_savevm_section_end);
SEMAPHORE(qemu_migrate_set_state);

struct section {
    const char *id;
    uint16_t number;
    int8_t delta;
    int64_t took;
};

int64_t global_signed;
uint8_t global_byte;
static int32_t table[16];
static uint64_t wide[16];
static struct section sections[4] = { { .id = "ram" }, { .id = "cpu" }, { .id = "gic" }, { .id = "its" } };

__attribute__((noinline)) static void fire(const char *text, int64_t n)
{
    int8_t byte = (int8_t)(n - 100);
    uint16_t half = (uint16_t)(n * 40503);
    int32_t word = (int32_t)(n * -2654435761);
    uint64_t whole = (uint64_t)n * 0x9e3779b97f4a7c15;
    unsigned at = (unsigned)n & 15;
    struct section *section = &sections[n & 3];

    global_signed = -n * 1000003;
    global_byte = (uint8_t)(n * 7);
    table[at] = word;
    wide[at] = whole;
    section->number = half;
    section->delta = byte;
    section->took = n * 11;

    STAP_PROBE4(operands, sizes, byte, half, word, whole);
    printf("sizes %d %u %" PRId32 " %" PRIu64 "\n", byte, half, word, whole);
    STAP_PROBE3(operands, constants, 7, -9, 0x123456789abcdefLL);
    printf("constants 7 -9 81985529216486895\n");
    STAP_PROBE2(operands, globals, global_signed, global_byte);
    printf("globals %" PRId64 " %u\n", global_signed, global_byte);
    STAP_PROBE2(operands, indexed, table[at], wide[at]);
    printf("indexed %" PRId32 " %" PRIu64 "\n", table[at], wide[at]);
    STAP_PROBE3(operands, structured, section->number, section->delta, section->took);
    printf("structured %u %d %" PRId64 "\n", section->number, section->delta, section->took);
    STAP_PROBE12(operands, many, byte, half, word, whole, n, 3, at, global_byte, table[at], wide[at],
                 section->delta, section->took);
    printf("many %d %u %" PRId32 " %" PRIu64 " %" PRId64 " 3 %u %u %" PRId32 " %" PRIu64 " %d %" PRId64
           "\n", byte, half, word, whole, n, at, global_byte, table[at], wide[at], section->delta,
           section->took);
    STAP_PROBE(operands, none);
    printf("none\n");

    /* As `trace_vmstate_downtime_save()` is made: nothing is computed for nobody. */
    if (__builtin_expect(qemu_vmstate_downtime_save_semaphore > 0, 0)) {
        STAP_PROBE4(qemu, vmstate_downtime_save, "non-iterable", section->id, (uint32_t)at, section->took);
        printf("vmstate_downtime_save non-iterable %s %u %" PRId64 "\n", section->id, at, section->took);
    }
    if (__builtin_expect(qemu_savevm_section_end_semaphore > 0, 0)) {
        STAP_PROBE3(qemu, savevm_section_end, section->id, (unsigned)section->number, (int)byte);
        printf("savevm_section_end %s %u %d\n", section->id, section->number, byte);
    }
    if (__builtin_expect(qemu_migrate_set_state_semaphore > 0, 0)) {
        STAP_PROBE1(qemu, migrate_set_state, text);
        printf("migrate_set_state %s\n", text);
    }
    fflush(stdout);
}

int main(void)
{
    char line[64];

    printf("ready\n");
    fflush(stdout);
    while (fgets(line, sizeof(line), stdin)) {
        char *text;
        int64_t n = strtoll(line, &text, 10);

        text[__builtin_strcspn(text, "\n")] = 0;
        fire(*text ? text + 1 : "none", n);
        printf("done\n");
        fflush(stdout);
    }
    return 0;
}

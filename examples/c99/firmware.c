/*
 * Run a model on a Cortex-M: read samples from a file of the host, write the outputs to another, say how many instructions
 * one sample took and how much stack was used. Files and text go through semihosting, which debuggers and QEMU provide;
 * there is no operating system and no C library behind this. Only kan_model_* belongs to the model.
 */
#include "model.h"

#include <stddef.h>

enum { SYS_OPEN = 0x01, SYS_CLOSE = 0x02, SYS_WRITE0 = 0x04, SYS_WRITE = 0x05, SYS_READ = 0x06, SYS_EXIT = 0x18 };

#define SYSTICK_CONTROL (*(volatile uint32_t *)0xE000E010u)
#define SYSTICK_RELOAD (*(volatile uint32_t *)0xE000E014u)
#define SYSTICK_VALUE (*(volatile uint32_t *)0xE000E018u)

#define PAINT 0xA5A5A5A5u
#define LOOPS 1000000u /* of two instructions each, to learn how many instructions a tick is */

extern uint32_t stack_bottom[], stack_painted[], stack_top[], data_start[], data_end[], data_source[], bss_start[], bss_end[];

static kan_model_state state;

static uint32_t host(uint32_t operation, const void *arguments)
{
    register uint32_t r0 __asm("r0") = operation;
    register const void *r1 __asm("r1") = arguments;
    __asm volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}

static void print(const char *text)
{
    host(SYS_WRITE0, text);
}

static void print_number(const char *name, uint32_t value)
{
    char digits[12];
    char *at = digits + sizeof digits - 1;
    *at = 0;
    do {
        *--at = (char)('0' + value % 10);
        value /= 10;
    } while (value != 0);
    print(name);
    print(" ");
    print(at);
    print("\n");
}

static uint32_t open_file(const char *name, uint32_t length, uint32_t mode)
{
    const uint32_t arguments[3] = {(uint32_t)name, mode, length};
    return host(SYS_OPEN, arguments);
}

/* Both return the number of bytes that were not transferred. */
static uint32_t read_file(uint32_t file, void *to, uint32_t size)
{
    const uint32_t arguments[3] = {file, (uint32_t)to, size};
    return host(SYS_READ, arguments);
}

static uint32_t write_file(uint32_t file, const void *from, uint32_t size)
{
    const uint32_t arguments[3] = {file, (uint32_t)from, size};
    return host(SYS_WRITE, arguments);
}

static uint32_t ticks(void)
{
    return 0xFFFFFFu - SYSTICK_VALUE;
}

static uint32_t elapsed(uint32_t since)
{
    return (ticks() - since) & 0xFFFFFFu;
}

static uint32_t ticks_of_loops(void)
{
    uint32_t left = LOOPS;
    const uint32_t since = ticks();
    __asm volatile(".syntax unified\n1: subs %0, %0, #1\n bne 1b" : "+l"(left) : : "cc");
    return elapsed(since);
}

static uint32_t stack_used(void)
{
    const uint32_t *at = stack_bottom;
    while (*at == PAINT)
        at++;
    return (uint32_t)(stack_top - at) * 4u;
}

static void end(uint32_t reason)
{
    host(SYS_EXIT, (const void *)reason);
    for (;;) {
    }
}

int main(void)
{
    static float x[KAN_MODEL_INPUTS], y[KAN_MODEL_OUTPUTS];
    const uint32_t inputs = open_file("inputs.bin", 10, 1);
    const uint32_t outputs = open_file("outputs.bin", 11, 5);
    uint32_t slowest = 0, samples = 0, tick_loops;
    SYSTICK_RELOAD = 0xFFFFFFu;
    SYSTICK_VALUE = 0;
    SYSTICK_CONTROL = 5;
    tick_loops = ticks_of_loops();
    while (read_file(inputs, x, sizeof x) == 0) {
        uint32_t since, took;
        kan_model_quantize(&state, x);
        since = ticks();
        kan_model_run(&state);
        took = elapsed(since);
        slowest = took > slowest ? took : slowest;
        kan_model_output(&state, y);
        if (write_file(outputs, y, sizeof y) != 0)
            end(0x20023u); /* a run-time error */
        samples++;
    }
    print_number("samples", samples);
    print_number("instructions", (uint32_t)((uint64_t)slowest * LOOPS * 2u / tick_loops));
    print_number("state", sizeof state);
    print_number("stack", stack_used());
    end(0x20026u); /* done */
    return 0;
}

void reset(void)
{
    uint32_t *at;
    const uint32_t *from = data_source;
    for (at = data_start; at < data_end;)
        *at++ = *from++;
    for (at = bss_start; at < bss_end;)
        *at++ = 0;
    /* the part of the stack that this function may use itself stays as it is */
    for (at = stack_bottom; at < stack_painted; at++)
        *at = PAINT;
    main();
}

static void fault(void)
{
    print("fault\n");
    end(0x20023u);
}

__attribute__((section(".vectors"), used)) static void (*const vectors[16])(void) = {
    (void (*)(void))stack_top, reset, fault, fault, fault, fault, fault, 0, 0, 0, 0, fault, fault, 0, fault, fault};

/*
 * The trit tensor types in plain C99, written from format.md, whose section numbers the comments give. It is meant to
 * be read, and to be the oracle of a port: clear and exact, not fast. No allocation, no global state, no dependence on
 * byte order or alignment. Take this file as it is, or its functions one by one.
 *
 *     cc -std=c99 -Wall -Wextra -pedantic -O2 -ffp-contract=off -c trit_reference.c
 *     cc -std=c99 -O2 -ffp-contract=off -DTRIT_REFERENCE_MAIN trit_reference.c -o trit_reference && ./trit_reference
 *
 * The second command makes a program that checks itself against the worked examples of section 6. Never compile with
 * -ffast-math or the like: section 4 defines every bit of a weight.
 *
 * A tensor's data is rows of trit_row_bytes(depth, columns) bytes, one directly after the other. Its ggml type id says
 * the depth (10001 to 10004: 1 to 4), the file's key trit.codebook.<tensor name> holds its codebook of 27 floats, or 27
 * for each matrix of a stack. With `entries` floats in all, and `rows` rows in each matrix, row r of the tensor has
 *
 *     const float *codebook = trit_codebook_of(r, rows, codebooks, entries);          NULL if there is none
 *     const unsigned char *row = data + r * trit_row_bytes(depth, columns);
 *     trit_decode_row(depth, columns, row, codebook, weights);        weights[0 .. columns - 1] of row r
 *     trit_dot_row(depth, columns, row, codebook, x, &product);       their dot product with x
 *
 * Both return 0, or -1 for a depth that is not 1 to 4 or columns that are no positive multiple of 64. Whatever bytes a
 * row holds, nothing outside the arrays is read: a digit is below its radix by construction.
 *
 * SPDX-License-Identifier: Apache-2.0
 */

#include <stddef.h>
#include <stdint.h>

#define TRIT_BLOCK 64   /* columns are a multiple of this */
#define TRIT_GROUP 16   /* weights that share a scale */
#define TRIT_SCALES 27  /* entries of a codebook */

size_t trit_row_bytes(int depth, size_t columns);
const float *trit_codebook_of(size_t r, size_t rows, const float *codebooks, size_t entries);
int trit_read_group(int depth, size_t columns, const unsigned char *row, size_t g, int level[TRIT_GROUP]);
int trit_decode_row(int depth, size_t columns, const unsigned char *row, const float *codebook, float *weights);
int trit_dot_row(int depth, size_t columns, const unsigned char *row, const float *codebook, const float *x,
                 float *product);

/* Section 1: h, by which a level lies below or above zero at most. */
static int largest_level(int depth)
{
    static const int h[5] = {0, 1, 4, 13, 40};
    return h[depth];
}

static int is_valid(int depth, size_t columns)
{
    return depth >= 1 && depth <= 4 && columns > 0 && columns % TRIT_BLOCK == 0;
}

/* Section 1: the bytes of a row; 0 for arguments that no tensor can have. */
size_t trit_row_bytes(int depth, size_t columns)
{
    static const size_t block_bytes[5] = {0, 16, 28, 42, 54};
    return is_valid(depth, columns) ? columns / TRIT_BLOCK * block_bytes[depth] : 0;
}

/* Section 2: the codebook of row r of a tensor whose matrices have so many rows each; NULL if there is none. */
const float *trit_codebook_of(size_t r, size_t rows, const float *codebooks, size_t entries)
{
    if (entries == TRIT_SCALES) {
        return codebooks; /* one for all matrices */
    }
    if (rows == 0 || entries % TRIT_SCALES != 0 || r / rows >= entries / TRIT_SCALES) {
        return NULL;
    }
    return codebooks + TRIT_SCALES * (r / rows);
}

/* The word at position n of a row, whatever the byte order of this machine. */
static uint32_t word_at(const unsigned char *row, size_t n)
{
    return (uint32_t)row[2 * n] | (uint32_t)row[2 * n + 1] << 8;
}

/* Section 3, "Words": take the next digit, of this radix, from a word. *v stays below 65536 and a radix is at most
   81 here, so the product fits. */
static int next_digit(uint32_t *v, uint32_t radix)
{
    uint32_t product = *v * radix;
    *v = product & 0xffff;
    return (int)(product >> 16);
}

/* The digit number `place`, counted from 0, of a word whose first digits all have this radix. */
static int digit_at(uint32_t word, uint32_t radix, size_t place)
{
    uint32_t v = word;
    int digit = next_digit(&v, radix);
    while (place-- > 0) {
        digit = next_digit(&v, radix);
    }
    return digit;
}

/* Section 3, the planes. Each function reads group g of a row of G groups into u[0 .. 15] and returns i[g]. */

static int read_group_1(size_t G, const unsigned char *row, size_t g, int u[TRIT_GROUP])
{
    uint32_t a0 = word_at(row, 2 * g), a1 = word_at(row, 2 * g + 1);
    int p, i_high, i_low;

    (void)G; /* the only plane starts at 0 */
    for (p = 0; p < 8; p++) {
        u[p] = next_digit(&a0, 3);
        u[p + 8] = next_digit(&a1, 3);
    }
    i_high = next_digit(&a0, 9);
    i_low = next_digit(&a1, 3);
    return 3 * i_high + i_low;
}

static int read_group_2(size_t G, const unsigned char *row, size_t g, int u[TRIT_GROUP])
{
    const size_t B = 2 * G, C = 3 * G; /* where these planes start */
    uint32_t a0 = word_at(row, 2 * g), a1 = word_at(row, 2 * g + 1);
    uint32_t b = word_at(row, B + g), c = word_at(row, C + g / 2);
    int p, u15[2], i[2];

    for (p = 0; p < 5; p++) {
        u[p] = next_digit(&a0, 9);
        u[p + 8] = next_digit(&a1, 9);
    }
    u[5] = next_digit(&b, 9);
    u[13] = next_digit(&b, 9);
    u[6] = next_digit(&b, 9);
    u[14] = next_digit(&b, 9);
    u[7] = next_digit(&b, 9);
    u15[0] = next_digit(&c, 9);
    u15[1] = next_digit(&c, 9);
    i[0] = next_digit(&c, 27);
    i[1] = next_digit(&c, 27);
    u[15] = u15[g % 2];
    return i[g % 2];
}

static int read_group_3(size_t G, const unsigned char *row, size_t g, int u[TRIT_GROUP])
{
    const size_t A1 = 2 * G, B = 4 * G, D = 5 * G;
    uint32_t a00 = word_at(row, 2 * g), a01 = word_at(row, 2 * g + 1);
    uint32_t a10 = word_at(row, A1 + 2 * g), a11 = word_at(row, A1 + 2 * g + 1);
    uint32_t b = word_at(row, B + g), d = word_at(row, D + g / 4);
    int p, z_high, z_middle, z_low, i_high, i_middle, i_low;

    for (p = 0; p < 3; p++) {
        u[p] = next_digit(&a00, 27);
        u[p + 8] = next_digit(&a01, 27);
        u[p + 3] = next_digit(&a10, 27);
        u[p + 11] = next_digit(&a11, 27);
    }
    z_high = next_digit(&a00, 3);
    z_middle = next_digit(&a01, 3);
    z_low = next_digit(&a10, 3);
    i_high = next_digit(&a11, 3);
    u[6] = next_digit(&b, 27);
    u[14] = next_digit(&b, 27);
    u[7] = next_digit(&b, 27);
    i_middle = next_digit(&b, 3);
    i_low = digit_at(d, 3, g % 4);
    u[15] = 9 * z_high + 3 * z_middle + z_low;
    return 9 * i_high + 3 * i_middle + i_low;
}

static int read_group_4(size_t G, const unsigned char *row, size_t g, int u[TRIT_GROUP])
{
    static const int split[3] = {6, 14, 7}; /* the weight that the words of A0, A1 and A2 share */
    const size_t C = 6 * G, D = 6 * G + G / 2;
    uint32_t c = word_at(row, C + g / 2), d = word_at(row, D + g / 4);
    int a, u15[2], i_high[2];

    for (a = 0; a < 3; a++) {
        uint32_t even = word_at(row, 2 * G * (size_t)a + 2 * g), odd = word_at(row, 2 * G * (size_t)a + 2 * g + 1);
        int high, low;

        u[2 * a] = next_digit(&even, 81);
        u[2 * a + 1] = next_digit(&even, 81);
        u[2 * a + 8] = next_digit(&odd, 81);
        u[2 * a + 9] = next_digit(&odd, 81);
        high = next_digit(&even, 9);
        low = next_digit(&odd, 9);
        u[split[a]] = 9 * high + low;
    }
    u15[0] = next_digit(&c, 81);
    u15[1] = next_digit(&c, 81);
    i_high[0] = next_digit(&c, 3);
    i_high[1] = next_digit(&c, 3);
    u[15] = u15[g % 2];
    return 9 * i_high[g % 2] + digit_at(d, 9, g % 4);
}

/* Read one group of a row: its 16 levels, from -h to h, and as the result the index of its scale, 0 to 26. The
   arguments must be valid, and g below columns / 16. */
int trit_read_group(int depth, size_t columns, const unsigned char *row, size_t g, int level[TRIT_GROUP])
{
    const size_t G = columns / TRIT_GROUP;
    int p, i;

    switch (depth) {
    case 1: i = read_group_1(G, row, g, level); break;
    case 2: i = read_group_2(G, row, g, level); break;
    case 3: i = read_group_3(G, row, g, level); break;
    default: i = read_group_4(G, row, g, level); break;
    }
    for (p = 0; p < TRIT_GROUP; p++) {
        level[p] -= largest_level(depth);
    }
    return i;
}

/* Section 4: the weights of a row, bit for bit. Two roundings, of the quotient and of the product. */
int trit_decode_row(int depth, size_t columns, const unsigned char *row, const float *codebook, float *weights)
{
    size_t g;

    if (!is_valid(depth, columns)) {
        return -1;
    }
    for (g = 0; g < columns / TRIT_GROUP; g++) {
        int level[TRIT_GROUP], p;
        const float step = codebook[trit_read_group(depth, columns, row, g, level)] / (float)largest_level(depth);

        for (p = 0; p < TRIT_GROUP; p++) {
            weights[TRIT_GROUP * g + (size_t)p] = step * (float)level[p];
        }
    }
    return 0;
}

/* Section 5: the dot product of a row with x[0 .. columns - 1], without forming weights. A kernel may round and order
   its additions as it likes; this one adds in double, from the first weight to the last, so that it is closer to the
   true product than any kernel needs to be. A level times a float is exact in double. */
int trit_dot_row(int depth, size_t columns, const unsigned char *row, const float *codebook, const float *x,
                 float *product)
{
    double total = 0.0;
    size_t g;

    if (!is_valid(depth, columns)) {
        return -1;
    }
    for (g = 0; g < columns / TRIT_GROUP; g++) {
        int level[TRIT_GROUP], p;
        const float step = codebook[trit_read_group(depth, columns, row, g, level)] / (float)largest_level(depth);
        double sum = 0.0;

        for (p = 0; p < TRIT_GROUP; p++) {
            sum += (double)level[p] * (double)x[TRIT_GROUP * g + (size_t)p];
        }
        total += (double)step * sum;
    }
    *product = (float)total;
    return 0;
}

#ifdef TRIT_REFERENCE_MAIN
#include <stdio.h>

/* Section 6: one row of 64 weights for each depth. */
static const unsigned char example[4][54] = {
    {0x34, 0x31, 0x15, 0xbb, 0xb2, 0x93, 0x38, 0x31, 0x13, 0xbb, 0xb0, 0x93, 0x3a, 0x31, 0x15, 0xbb},
    {0x8e, 0x5b, 0x65, 0x98, 0x0b, 0xd8, 0x01, 0x18, 0x8f, 0x3b, 0x65, 0x78, 0x0b, 0xb8, 0x01, 0xf8,
     0xa4, 0x45, 0x9a, 0xc5, 0xcd, 0x28, 0x9a, 0xa5, 0xe9, 0x0c, 0x84, 0xee},
    {0x2e, 0x20, 0xdf, 0x33, 0x90, 0x47, 0x42, 0x5b, 0xf2, 0x6e, 0x4b, 0x82, 0xfb, 0x95, 0xac, 0xa9, 0x1b, 0xe5,
     0xcc, 0xf8, 0x7e, 0x0c, 0x2e, 0x20, 0xe1, 0x33, 0x91, 0x47, 0x41, 0x5b, 0xf3, 0x6e, 0x04, 0xb2, 0x0f, 0xd9,
     0xf4, 0xf6, 0x57, 0x1e, 0x6f, 0xcd},
    {0xe5, 0x09, 0x0c, 0xbd, 0x18, 0x6d, 0x17, 0x1d, 0x41, 0xd0, 0x4a, 0x80, 0x4b, 0x30, 0x74, 0xe3, 0xad, 0x36,
     0xd9, 0xe9, 0xe0, 0x99, 0xe4, 0x49, 0xe0, 0xf9, 0x0e, 0xad, 0x13, 0x5d, 0x18, 0x0d, 0x7b, 0x63, 0x81, 0x13,
     0xa5, 0xc6, 0xaa, 0x76, 0xaf, 0x26, 0xde, 0xd9, 0xe2, 0x89, 0xdf, 0x39, 0x99, 0x57, 0xd3, 0x1a, 0x61, 0x50},
};

int main(void)
{
    static const int levels[5] = {0, 3, 9, 27, 81};
    float codebook[TRIT_SCALES], weights[TRIT_BLOCK];
    int c, depth, k, failures = 0;

    for (c = 0; c < TRIT_SCALES; c++) {
        codebook[c] = (float)(c + 1) / 64.0f;
    }
    for (depth = 1; depth <= 4; depth++) {
        int wrong = trit_decode_row(depth, TRIT_BLOCK, example[depth - 1], codebook, weights) != 0;

        for (k = 0; k < TRIT_BLOCK; k++) {
            const float step = codebook[(5 * (k / TRIT_GROUP) + 2) % TRIT_SCALES] / (float)largest_level(depth);
            wrong += weights[k] != step * (float)((7 * k + 3) % levels[depth] - largest_level(depth));
        }
        printf("TRIT%d: %s section 6\n", depth, wrong ? "NOT as stated in" : "as stated in");
        failures += wrong != 0;
    }
    return failures != 0;
}
#endif

/* Changes its memory by system calls that no library sees, from threads too, and then has the program
   that it is told of do so: this one again, linked statically. Prints what they returned. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, THREADS = 4, ROUNDS = 300 };

static long raw(long number, long a, long b, long c, long d, long e, long f) {
    long result;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    __asm__ volatile("syscall" : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

static char *map(char *at, long bytes, int flags) {
    flags |= MAP_PRIVATE | MAP_ANONYMOUS;
    return (char *)raw(SYS_mmap, (long)at, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
}

/* Returns a sum of what it found, which is the same each time. */
static void *work(void *argument) {
    long sum = (long)argument;
    for (int round = 0; round < ROUNDS; round++) {
        char *at = map(NULL, 16 * PAGE, 0);
        memset(at, round, 16 * PAGE);
        sum = sum * 31 + (map(at + PAGE, PAGE, MAP_FIXED) == at + PAGE) + at[0] + at[PAGE];
        sum = sum * 31 + raw(SYS_madvise, (long)at, 2 * PAGE, MADV_DONTNEED, 0, 0, 0) + at[0];
        sum = sum * 31 + raw(SYS_mprotect, (long)at, 4 * PAGE, PROT_READ, 0, 0, 0) + at[3 * PAGE];
        char *moved = (char *)raw(SYS_mremap, (long)(at + 8 * PAGE), 8 * PAGE, 9 * PAGE,
                                  MREMAP_MAYMOVE, 0, 0);
        sum = sum * 31 + moved[0] + moved[8 * PAGE];
        sum = sum * 31 + raw(SYS_munmap, (long)moved, 9 * PAGE, 0, 0, 0, 0);
        sum = sum * 31 + raw(SYS_munmap, (long)at, 8 * PAGE, 0, 0, 0, 0);
    }
    return (void *)sum;
}

static void errors(void) {
    char *at = map(NULL, PAGE, 0);
    raw(SYS_munmap, (long)at, PAGE, 0, 0, 0, 0);
    /* The lowest page is nobody's. */
    printf("munmap %ld\n", raw(SYS_munmap, 1, PAGE, 0, 0, 0, 0));
    printf("mprotect %ld\n", raw(SYS_mprotect, PAGE, PAGE, PROT_READ, 0, 0, 0));
    printf("mremap %ld\n", raw(SYS_mremap, PAGE, PAGE, 2 * PAGE, 0, 0, 0));
    printf("madvise %ld\n", raw(SYS_madvise, PAGE, PAGE, MADV_DONTNEED, 0, 0, 0));
    printf("mmap %ld\n", raw(SYS_mmap, 1, PAGE, PROT_READ, MAP_PRIVATE | MAP_FIXED, -1, 0));
    printf("shmdt %ld\n", raw(SYS_shmdt, 1, 0, 0, 0, 0, 0));
    printf("ftruncate %ld\n", raw(SYS_ftruncate, -1, 0, 0, 0, 0, 0));
    printf("truncate %ld\n", raw(SYS_truncate, 1, 0, 0, 0, 0, 0));
    long end = raw(SYS_brk, 0, 0, 0, 0, 0, 0);
    printf("brk %d\n", raw(SYS_brk, end + PAGE, 0, 0, 0, 0, 0) == end + PAGE);
    printf("brk %d\n", raw(SYS_brk, end, 0, 0, 0, 0, 0) == end);
}

int main(int count, char **arguments) {
    pthread_t threads[THREADS];
    for (long thread = 0; thread < THREADS; thread++)
        pthread_create(&threads[thread], NULL, work, (void *)thread);
    for (int thread = 0; thread < THREADS; thread++) {
        void *sum;
        pthread_join(threads[thread], &sum);
        printf("sum %ld\n", (long)sum);
    }
    errors();
    if (count < 2)
        return 5;
    fflush(stdout);
    int status = -1;
    if (fork() == 0) {
        execl(arguments[1], arguments[1], (char *)NULL);
        _exit(99);
    }
    wait(&status);
    printf("it ends with %d\n", WEXITSTATUS(status));
    return 6;
}

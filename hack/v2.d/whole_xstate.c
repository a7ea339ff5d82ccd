/* Loaded into User-mode Linux (LD_PRELOAD): hands the host whole extended register states.
 *
 * Debian 12's User-mode Linux keeps room for registers up to AVX-512. Where the processor has more (AMX: 11 KB), the
 * host gives it the part that it has room for, but takes back only a whole state: PTRACE_SETREGSET fails with EFAULT
 * (xstateregs_set in the host's arch/x86/kernel/fpu/regset.c), and the guest panics before its first program. What lies
 * beyond the caller's room is of components that the state's own header calls unused, so zeros do.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/uio.h>

#ifndef NT_X86_XSTATE
#define NT_X86_XSTATE 0x202
#endif

typedef long ptrace_function(enum __ptrace_request, pid_t, void *, void *);

static __thread char state[64 * 1024];
static size_t whole;

long ptrace(enum __ptrace_request request, ...)
{
	static ptrace_function *real;
	va_list more;
	va_start(more, request);
	pid_t pid = va_arg(more, pid_t);
	void *address = va_arg(more, void *);
	void *data = va_arg(more, void *);
	va_end(more);

	if (!real)
		real = (ptrace_function *)dlsym(RTLD_NEXT, "ptrace");
	if (request != PTRACE_SETREGSET || (long)address != NT_X86_XSTATE)
		return real(request, pid, address, data);

	struct iovec *given = data;
	if (!whole) {
		struct iovec all = { state, sizeof(state) };
		if (real(PTRACE_GETREGSET, pid, address, &all) != 0)
			return -1;
		whole = all.iov_len;
		memset(state, 0, sizeof(state));
	}
	if (given->iov_len >= whole)
		return real(request, pid, address, data);
	memcpy(state, given->iov_base, given->iov_len);
	struct iovec complete = { state, whole };
	return real(request, pid, address, &complete);
}

// For GSPN_MANYLINUX: definitions of what the headers of GCC 11 and later use, and what only the shared libraries of
// GCC 11 and glibc 2.32 have. With them the extension needs nothing newer than manylinux_2_28 has. They are hidden, so
// that they serve this extension alone.
#include <exception>
#include <new>

#define GSPN_HIDDEN __attribute__((visibility("hidden")))

// glibc 2.32. False is always right: reference counts are then atomic also while there is one thread.
extern "C" {
GSPN_HIDDEN extern const char gspn_libc_single_threaded __asm__("__libc_single_threaded");
const char gspn_libc_single_threaded = 0;
}

// GLIBCXX_3.4.29.
extern "C" {
[[noreturn]] GSPN_HIDDEN void gspn_throw_bad_array_new_length() __asm__("_ZSt28__throw_bad_array_new_lengthv");
void gspn_throw_bad_array_new_length() { throw std::bad_array_new_length(); }
}

// CXXABI_1.3.13: std::exception_ptr's reference count, which its copy constructor and destructor keep too. The library
// has had these since CXXABI_1.3.3.
extern "C" {
void gspn_copy_exception_ptr(void* target, const void* source) __asm__("_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
void gspn_destroy_exception_ptr(void* target) __asm__("_ZNSt15__exception_ptr13exception_ptrD1Ev");

GSPN_HIDDEN void gspn_add_reference(void* pointer) __asm__("_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
GSPN_HIDDEN void gspn_release(void** pointer) __asm__("_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");

void gspn_add_reference(void* pointer) {
  void* copy;  // never destroyed, so that its reference stays
  gspn_copy_exception_ptr(&copy, pointer);
}

void gspn_release(void** pointer) {
  gspn_destroy_exception_ptr(pointer);
  *pointer = nullptr;
}
}

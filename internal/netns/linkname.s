// This file is empty. That there is one lets the compiler accept functions without a body, which the linker finds in the runtime.

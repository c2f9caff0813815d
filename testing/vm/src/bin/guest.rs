//! The first process of the virtual machine; everything is in [`r3map_vm::guest`]. It does nothing anywhere else.

fn main() -> std::process::ExitCode {
    r3map_vm::guest::main()
}

;; Counts the primes up to ten million with the sieve of Eratosthenes, a little at a time.
;;
;; Everything that it knows is in its memory, also where in its loops it is, so that it can be stopped between two calls of
;; `step` and go on in another instance that has the same memory. Memory that is all zeros is the beginning.
;;
;;     0  phase, i32: 0 sieve, 1 count, 2 finished
;;     4  prime, i32: the number whose multiples are struck out, or that is looked at; 0 stands for 2
;;     8  multiple, i32: the next one to strike out, or 0
;;    12  count, i32: the primes that were counted
;;    16  work, i64: how many small pieces of work were done
;; 65536  a byte for each number, 1 if it was struck out
(module
  ;; 64 KiB, and a byte for each number up to ten million. It never grows.
  (memory (export "memory") 154 154)

  ;; Does so many small pieces of work, or what is left; 1 if nothing is left.
  (func (export "step") (param $budget i32) (result i32)
    (local $prime i32) (local $multiple i32) (local $done i32)
    (local.set $prime (i32.load (i32.const 4)))
    (if (i32.eqz (local.get $prime)) (then (local.set $prime (i32.const 2))))
    (local.set $multiple (i32.load (i32.const 8)))
    (block $out
      (loop $work
        (br_if $out (i32.eq (i32.load (i32.const 0)) (i32.const 2)))
        (br_if $out (i32.eq (local.get $done) (local.get $budget)))
        (local.set $done (i32.add (local.get $done) (i32.const 1)))
        (if (i32.eqz (i32.load (i32.const 0)))
          (then
            (if (i32.eqz (local.get $multiple))
              (then
                ;; Begin with a number: strike out from its square on, if it was not struck out itself.
                (if (i32.gt_u (local.get $prime) (i32.const 3162))
                  (then
                    (i32.store (i32.const 0) (i32.const 1))
                    (local.set $prime (i32.const 2))
                    (br $work)))
                (if (i32.load8_u offset=65536 (local.get $prime))
                  (then (local.set $prime (i32.add (local.get $prime) (i32.const 1))))
                  (else (local.set $multiple (i32.mul (local.get $prime) (local.get $prime))))))
              (else
                (i32.store8 offset=65536 (local.get $multiple) (i32.const 1))
                (local.set $multiple (i32.add (local.get $multiple) (local.get $prime)))
                (if (i32.gt_u (local.get $multiple) (i32.const 10000000))
                  (then
                    (local.set $multiple (i32.const 0))
                    (local.set $prime (i32.add (local.get $prime) (i32.const 1))))))))
          (else
            (if (i32.eqz (i32.load8_u offset=65536 (local.get $prime)))
              (then (i32.store (i32.const 12) (i32.add (i32.load (i32.const 12)) (i32.const 1)))))
            (local.set $prime (i32.add (local.get $prime) (i32.const 1)))
            (if (i32.gt_u (local.get $prime) (i32.const 10000000))
              (then (i32.store (i32.const 0) (i32.const 2))))))
        (br $work)))
    (i32.store (i32.const 4) (local.get $prime))
    (i32.store (i32.const 8) (local.get $multiple))
    (i64.store (i32.const 16) (i64.add (i64.load (i32.const 16)) (i64.extend_i32_u (local.get $done))))
    (i32.eq (i32.load (i32.const 0)) (i32.const 2)))

  ;; The primes that were counted so far.
  (func (export "count") (result i32) (i32.load (i32.const 12)))

  ;; How many small pieces of work were done so far.
  (func (export "work") (result i64) (i64.load (i32.const 16)))

  ;; What the memory's size was before it grew by so many pages, or -1 as it cannot.
  (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))

  ;; The byte at an address, which may be outside.
  (func (export "peek") (param i32) (result i32) (i32.load8_u (local.get 0))))

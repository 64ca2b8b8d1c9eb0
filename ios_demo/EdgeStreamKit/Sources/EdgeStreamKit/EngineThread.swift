import Foundation

/// One thread of its own for everything that a session computes.
///
/// A decode blocks for as long as it takes, which threads of the cooperative pool must not. A dispatch queue would move
/// between threads: ggml keeps a team of helpers per calling thread, and secondary threads have small stacks.
final class EngineThread: SerialExecutor {
    private final class Jobs: @unchecked Sendable {
        private let condition = NSCondition()
        private var waiting: [() -> Void] = []
        private var isClosed = false

        func add(_ job: @escaping () -> Void) {
            condition.withLock {
                waiting.append(job)
                condition.signal()
            }
        }

        func close() {
            condition.withLock {
                isClosed = true
                condition.signal()
            }
        }

        /// The next job; nil once there will be none.
        func next() -> (() -> Void)? {
            condition.withLock {
                while waiting.isEmpty && !isClosed {
                    condition.wait()
                }
                return waiting.isEmpty ? nil : waiting.removeFirst()
            }
        }
    }

    private let jobs = Jobs()

    init() {
        start("edge-stream session") { [jobs] in
            while let job = jobs.next() {
                job()
            }
        }
    }

    deinit {
        jobs.close()
    }

    func enqueue(_ job: consuming ExecutorJob) {
        let job = UnownedJob(job)
        // holds self: the job may be what lets go of the session, and thereby of this executor
        jobs.add { job.runSynchronously(on: self.asUnownedSerialExecutor()) }
    }
}

private func start(_ name: String, _ body: @escaping @Sendable () -> Void) {
    let thread = Thread(block: body)
    thread.name = name
    thread.stackSize = 8 << 20  // tokenizers recurse on long texts
    thread.qualityOfService = .userInitiated
    thread.start()
}

/// Runs what blocks on a thread of its own. `work` is told whether the calling task has been cancelled since.
func onThread<Value: Sendable>(
    _ name: String, _ work: @escaping @Sendable (_ isCancelled: @escaping @Sendable () -> Bool) throws(EdgeStreamError)
        -> Value
) async throws(EdgeStreamError) -> Value {
    let flag = Flag()
    let result: Result<Value, EdgeStreamError> = await withTaskCancellationHandler {
        await withCheckedContinuation { continuation in
            start("edge-stream \(name)") {
                do throws(EdgeStreamError) {
                    continuation.resume(returning: .success(try work { flag.isUp }))
                } catch {
                    continuation.resume(returning: .failure(error))
                }
            }
        }
    } onCancel: {
        flag.raise()
    }
    return try result.get()
}

final class Flag: @unchecked Sendable {
    private let lock = NSLock()
    private var up = false

    var isUp: Bool { lock.withLock { up } }
    func raise() { lock.withLock { up = true } }
}

import CEdgeStream

/// Something long goes on: `done` of `total` (tokens, bytes, or thousandths of a model). Called on the working thread.
public typealias ProgressHandler = @Sendable (_ done: Int, _ total: Int) -> Void

/// Calls C with a callback that reports progress and, once cancelled, asks to stop.
func withProgress<Result>(
    _ report: ProgressHandler?, isCancelled: @escaping () -> Bool,
    _ call: (_ callback: @escaping es_app_progress, _ user: UnsafeMutableRawPointer) -> Result
) -> Result {
    let watch = Watch(report: report, isCancelled: isCancelled)
    return withExtendedLifetime(watch) {
        call(
            { user, done, total in
                guard let user else { return true }
                let watch = Unmanaged<Watch>.fromOpaque(user).takeUnretainedValue()
                watch.report?(Int(clamping: done), Int(clamping: total))
                return !watch.isCancelled()
            }, Unmanaged.passUnretained(watch).toOpaque())
    }
}

private final class Watch {
    let report: ProgressHandler?
    let isCancelled: () -> Bool

    init(report: ProgressHandler?, isCancelled: @escaping () -> Bool) {
        self.report = report
        self.isCancelled = isCancelled
    }
}

import ChatCore

/// Slows an answer down, or pauses it, as the device's temperature asks for.
@MainActor
final class AnswerPacer {
    private var policy = ThermalPolicy()
    private var waiting: [CheckedContinuation<Void, Never>] = []

    var isPaused: Bool { policy.pace == .paused }
    /// An answer is being held.
    var isHolding: Bool { !waiting.isEmpty }

    func update(_ level: ThermalLevel) {
        policy.update(level)
        if !isPaused { wake() }
    }

    /// Rests after a token that took this long: for a while, or until the device has cooled down.
    func rest(after token: Duration, _ system: any ChatSystem) async throws {
        while !Task.isCancelled {
            if let pause = policy.rest(after: token) {
                return pause > .zero ? try await system.sleep(for: pause) : ()
            }
            await withCheckedContinuation { waiting.append($0) }
        }
    }

    /// Lets a held answer look again at whether it may go on, or has been cancelled.
    func wake() {
        for continuation in waiting {
            continuation.resume()
        }
        waiting = []
    }
}

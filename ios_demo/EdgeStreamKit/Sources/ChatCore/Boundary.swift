import Foundation

/// Everything that an app asks of the system, and nothing else: what tests put a fake in for.
@MainActor
public protocol ChatSystem: AnyObject {
    /// Bytes that this process may still take before the system ends it; nil where the system does not tell.
    var availableMemory: UInt64? { get }
    /// Bytes that the system counts as this process's; nil where it does not tell.
    var footprint: UInt64? { get }
    var thermalLevel: ThermalLevel { get }
    /// From now on.
    func events() -> AsyncStream<SystemEvent>
    /// Asks the system for time to finish something in the background. To be ended with what it returns.
    func beginBackgroundTime() -> Int
    func endBackgroundTime(_ id: Int)
    func sleep(for duration: Duration) async throws
}

/// Lists and downloads models.
public protocol ModelSource: Sendable {
    func files(of repository: HubRepository) async throws -> [HubRepository.File]
    /// The downloaded file, which is the caller's to move or remove. Goes on in the background where the system can.
    func download(
        _ file: HubRepository.File, onProgress: @escaping @Sendable (Double) -> Void
    ) async throws -> URL
}

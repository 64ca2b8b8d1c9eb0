import ChatCore
import EdgeStreamKit
import Foundation
import Observation

/// The models on this device, and the imports and downloads on their way into the store.
@MainActor
@Observable
final class ModelLibrary {
    private(set) var models: [ModelStore.Entry] = []
    /// By name: 0...1.
    private(set) var arriving: [String: Double] = [:]

    @ObservationIgnored private let store: ModelStore
    @ObservationIgnored let source: any ModelSource

    init(folder: URL, source: any ModelSource) throws {
        store = try ModelStore(folder: folder) { try await sha256(of: $0) }
        self.source = source
    }

    func refresh() throws {
        models = try store.entries()
    }

    func add(_ url: URL) async throws {
        try await arrive(url.lastPathComponent) { progress in
            try await self.store.add(url, onProgress: progress)
        }
    }

    func download(_ file: HubRepository.File) async throws {
        try await arrive(file.manifest.name) { progress in
            let arrived = try await self.source.download(file, onProgress: progress)
            defer { try? FileManager.default.removeItem(at: arrived) }
            return try await self.store.add(arrived, expected: file.manifest, move: true)
        }
    }

    func remove(_ entry: ModelStore.Entry) throws {
        try store.remove(entry)
    }

    private func arrive(
        _ name: String, _ work: (_ progress: @escaping @Sendable (Double) -> Void) async throws -> ModelStore.Entry
    ) async throws {
        guard arriving[name] == nil else { return }
        arriving[name] = 0
        defer { arriving[name] = nil }
        _ = try await work { share in
            Task { @MainActor in
                if self.arriving[name] != nil { self.arriving[name] = share }
            }
        }
    }
}
